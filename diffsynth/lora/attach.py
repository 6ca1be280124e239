"""LoRAs that stay beside the weights: a Linear layer with branches, and tensors that are changed when read.

The branches' factors are parameters of the network, so that they move, stream and train with their block
(those that train do not stream). Taking the last branch away puts the very layer back that was there before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffsynth.errors import ArgumentError
from diffsynth.lora.changes import (
    Change,
    Decomposed,
    Kronecker,
    LowRank,
    as_matrix,
    changed,
    row_pieces,
    tensors_of,
    with_tensors,
)
from diffsynth.lora.formats import LayerChange
from diffsynth.ops.fp8 import Fp8Linear

REGEX = "re:"  # a target that begins so is a regular expression for whole names of layers
Init = Literal["kaiming", "gaussian"]


class Dial:
    """How strongly a LoRA acts now: one object, read by all its branches.

    Args:
        name: of the LoRA.
        weight: strength; 1 is as trained.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.name, self.weight, self.is_on = name, weight, True
        self.schedule: tuple[float, ...] | None = None  # a strength for each step, instead of ``weight``
        self.step = 0

    @property
    def value(self) -> float:
        """The strength at this step."""
        if not self.is_on:
            return 0.0
        return self.weight if self.schedule is None else self.schedule[min(self.step, len(self.schedule) - 1)]

    @property
    def is_felt(self) -> bool:
        """Whether it changes anything, at any step."""
        return self.is_on and any(self.schedule if self.schedule is not None else (self.weight,))

    def __str__(self) -> str:
        """The strength in words: "strength 0.8", or "strengths 1, 0.5 by step"; and whether it is off."""
        steps = ", ".join(f"{weight:g}" for weight in self.schedule or ())
        text = f"strengths {steps} by step" if steps else f"strength {self.weight:g}"
        return text if self.is_on else f"off ({text} when it is on)"


class _Factors(nn.Module):
    """The tensors of one change, as parameters, and the formula that reads them."""

    def __init__(
        self, change: Change, dial: Dial, device: torch.device, dtype: torch.dtype, *, trains: bool = False
    ) -> None:
        super().__init__()
        self.dial, self.trains = dial, trains
        tensors = tensors_of(change)
        for name, tensor in tensors.items():
            own = tensor.to(device, dtype, copy=True).contiguous()  # none keeps the LoRA's file mapped
            self.register_parameter(name, nn.Parameter(own, requires_grad=trains))
        self._names = tuple(tensors)
        self._formula: Change = with_tensors(change, {name: torch.empty(0) for name in tensors})

    @property
    def change(self) -> Change:
        """The change, with the tensors as they are now."""
        return with_tensors(self._formula, {name: getattr(self, name) for name in self._names})


class LoRABranch(_Factors):
    """One LoRA beside one Linear layer.

    Args:
        change: of the layer's weight (N, K).
        dial: tells the strength.
        device: of the factors.
        dtype: of the factors.
        original: the layer's weight (N, K) in float32; only a DoRA that does not train reads it, once.
        trains: the factors get gradients, and a DoRA's lengths are measured at each call.
    """

    def __init__(
        self,
        change: Change,
        dial: Dial,
        device: torch.device,
        dtype: torch.dtype,
        original: Tensor | None = None,
        *,
        trains: bool = False,
    ) -> None:
        super().__init__(change, dial, device, dtype, trains=trains)
        self.gain: Tensor | None
        gain = None
        if isinstance(change, Decomposed) and not trains:
            assert original is not None
            gain = change.gain(as_matrix(original)).flatten().to(device, dtype)
        self.register_buffer("gain", gain)

    def add_to(self, y: Tensor, x: Tensor, layer: LoRALinear) -> Tensor:
        """Y + strength * change(x); x (..., K), y (..., N), changed outside of training."""
        change, strength = self.change, self.dial.value
        if isinstance(change, LowRank):
            hidden = F.linear(x, change.down.to(x.dtype))
            return _plus_product(y, hidden, change.up.to(x.dtype), strength * change.scale)
        if isinstance(change, Kronecker) and self.trains:
            return _plus(y, _kronecker_product(change, x), strength * change.scale)
        if isinstance(change, Decomposed):
            gain = (self._gain_now(change, layer) if self.gain is None else self.gain).to(x.dtype)
            plain = layer.without_bias(x)
            if self.trains and isinstance(change.inner, LowRank) and change.is_per_row:
                product = F.linear(F.linear(x, change.inner.down.to(x.dtype)), change.inner.up.to(x.dtype))
                return y + strength * ((gain - 1) * plain + gain * change.inner.scale * product)
            if change.is_per_row:
                new = (plain + F.linear(x, self._whole(change.inner, x))) * gain
            else:
                turned = x * gain
                new = layer.without_bias(turned) + F.linear(turned, self._whole(change.inner, x))
            return y + strength * (new - plain)
        return _plus(y, F.linear(x, self._whole(change, x)), strength)

    @staticmethod
    def _gain_now(change: Decomposed, layer: LoRALinear) -> Tensor:
        """Magnitude over length, (N,) or (K,) float32: the length counts as a constant (DoRA paper, 4.3)."""
        base = layer.base
        with torch.no_grad():
            weight = base.widened(torch.float32) if isinstance(base, Fp8Linear) else base.weight
            inverse = replace(change, magnitude=torch.ones_like(change.magnitude)).gain(as_matrix(weight))
        return change.magnitude.flatten() * inverse.flatten()

    def _whole(self, change: Change, x: Tensor) -> Tensor:
        assert not isinstance(change, Decomposed)
        out = torch.zeros(change.shape, dtype=x.dtype, device=x.device)
        for where in row_pieces(out):
            change.add_to(out[where], where, 1.0)
        return out


class LoRALinear(nn.Module):
    """A Linear layer, plain or in fp8, and the branches beside it.

    Args:
        base: the layer whose place it takes.
    """

    def __init__(self, base: nn.Linear | Fp8Linear) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleList()
        self.offsets = nn.ModuleList()  # changes of the bias
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """(N, K) with every branch added, for the places that read a weight instead of calling a layer."""
        base = self.base
        weight = base.widened(torch.bfloat16) if isinstance(base, Fp8Linear) else base.weight
        active = [(b.change, b.dial.value) for b in self._active(self.branches)]
        return changed(weight, active, weight.dtype) if active else weight

    @property
    def bias(self) -> Tensor | None:
        """(N,) with every change of it added."""
        bias = self.base.bias
        active = [(o.change, o.dial.value) for o in self._active(self.offsets)]
        return changed(bias, active, bias.dtype) if active and bias is not None else bias

    def forward(self, x: Tensor) -> Tensor:
        """X (..., K) -> (..., N)."""
        active = self._active(self.branches)
        beside = x
        if x.is_cuda and len(active) == 1 and torch.is_grad_enabled() and x.requires_grad:
            x, beside = twice(x)  # a CPU keeps autograd's order of sums, and with it its numbers
        y: Tensor = self.base(x)
        for branch in active:
            assert isinstance(branch, LoRABranch)
            y = branch.add_to(y, beside, self)
        for offset in self._active(self.offsets):
            y = _plus(y, next(offset.parameters()).to(y.dtype), offset.dial.value)
        return y

    def without_bias(self, x: Tensor) -> Tensor:
        """What the layer gives without branches and bias."""
        y: Tensor = self.base(x)
        return y if self.base.bias is None else y - self.base.bias.to(y.dtype)

    @staticmethod
    def _active(branches: Iterable[nn.Module]) -> list[_Factors]:
        return [b for b in branches if isinstance(b, _Factors) and b.dial.value != 0.0]


AnyLinear = nn.Linear | Fp8Linear | LoRALinear


class ChangedTensor(_Factors):
    """A tensor that is no Linear's, changed each time it is read: norms, modulation, convolutions."""

    def forward(self, original: Tensor) -> Tensor:
        """The tensor with the change; itself at strength 0."""
        strength = self.dial.value
        return original if strength == 0.0 else changed(original, [(self.change, strength)], original.dtype)


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """X for a layer and x for its branch, whose gradients are added up in the memory of the layer's."""
    if torch.compiler.is_compiling():
        return x, x
    pair: tuple[Tensor, Tensor] = _Twice.apply(x)  # type: ignore[no-untyped-call]
    return pair


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        of_layer, of_branch = grads
        # A layer's product, which nobody else holds: autograd would make a third tensor as wide as they are.
        return of_layer.add_(of_branch)


def _plus_product(y: Tensor, hidden: Tensor, up: Tensor, strength: float) -> Tensor:
    """Y + strength * hidden @ up.T, without room for the product outside of training."""
    if torch.is_grad_enabled() or not y.is_contiguous():
        return y + strength * F.linear(hidden, up)
    y.view(-1, y.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=strength)
    return y


def _kronecker_product(change: Kronecker, x: Tensor) -> Tensor:
    """kron(w1, w2) x for x (..., K1 K2), without the whole matrix: (..., N1 N2)."""

    def times(z: Tensor, matrix: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        for factor in reversed(matrix) if isinstance(matrix, tuple) else (matrix.flatten(1),):
            z = F.linear(z, factor.to(z.dtype))
        return z

    num_first = (change.w1[1] if isinstance(change.w1, tuple) else change.w1).shape[1]
    inner = times(x.view(*x.shape[:-1], num_first, -1), change.w2)  # (..., K1, N2)
    return times(inner.transpose(-1, -2), change.w1).transpose(-1, -2).flatten(-2)


def _plus(y: Tensor, other: Tensor, strength: float) -> Tensor:
    return y + strength * other if torch.is_grad_enabled() else y.add_(other, alpha=strength)


def attach(
    network: nn.Module,
    changes: Mapping[str, Change],
    dial: Dial,
    originals: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    *,
    trains: bool = False,
) -> None:
    """Put changes beside the tensors of a network.

    Args:
        network: gets them in place; its own tensors stay as they are.
        changes: by name of the tensor ("blocks.0.self_attn.q.weight"); they fit it.
        dial: tells the strength, now and later.
        originals: of tensors that a DoRA changes, without any LoRA; not read where it trains.
        dtype: of the factors; None: that of the tensor beside them, bfloat16 beside fp8.
        trains: the factors get gradients.
    """
    for name, change in changes.items():
        parent, _, leaf = name.rpartition(".")
        layer = network.get_submodule(parent)
        if isinstance(layer, (nn.Linear, Fp8Linear)):
            wrapped = LoRALinear(layer).train(layer.training)
            setattr(network.get_submodule(parent.rpartition(".")[0]), parent.rpartition(".")[2], wrapped)
            layer = wrapped
        base = layer.base if isinstance(layer, LoRALinear) else layer
        tensor = getattr(base, leaf)
        assert isinstance(tensor, Tensor)
        kind = dtype or (torch.bfloat16 if isinstance(base, Fp8Linear) else tensor.dtype)
        if not isinstance(layer, LoRALinear):
            own = ChangedTensor(change, dial, tensor.device, kind, trains=trains)
            parametrize.register_parametrization(layer, leaf, own, unsafe=True)
        elif leaf == "weight":
            original = (originals or {}).get(name)
            layer.branches.append(LoRABranch(change, dial, tensor.device, kind, original, trains=trains))
        else:
            layer.offsets.append(_Factors(change, dial, tensor.device, kind, trains=trains))


def detach(network: nn.Module, dial: Dial) -> None:
    """Take a LoRA's changes away; layers that have none left are the very ones that were there before."""
    for path, layer in list(network.named_modules()):
        if isinstance(layer, LoRALinear):
            for branches in (layer.branches, layer.offsets):
                _remove(branches, dial)
            if not layer.branches and not layer.offsets:
                parent, _, child = path.rpartition(".")
                setattr(network.get_submodule(parent), child, layer.base)
        elif parametrize.is_parametrized(layer):
            lists = layer.parametrizations
            assert isinstance(lists, nn.ModuleDict)
            for leaf, chain in list(lists.items()):
                assert isinstance(chain, nn.ModuleList)
                if all(isinstance(one, _Factors) and one.dial is dial for one in chain):
                    parametrize.remove_parametrizations(layer, leaf, leave_parametrized=False)
                else:
                    _remove(chain, dial)


def _remove(branches: nn.ModuleList, dial: Dial) -> None:
    for index in reversed(range(len(branches))):
        one = branches[index]
        if isinstance(one, _Factors) and one.dial is dial:
            del branches[index]


def attached_layers(network: nn.Module, dial: Dial) -> dict[str, LayerChange]:
    """What is attached to Linear layers, by layer, with the factors as they are now: for writing a file."""
    found: dict[str, LayerChange] = {}
    for path, layer in network.named_modules():
        if isinstance(layer, LoRALinear):
            weights = [b.change for b in layer.branches if isinstance(b, _Factors) and b.dial is dial]
            biases = [
                next(o.parameters()) for o in layer.offsets if isinstance(o, _Factors) and o.dial is dial
            ]
            if weights or biases:
                found[path] = LayerChange(
                    weight=weights[0] if weights else None, bias=biases[0] if biases else None
                )
    return found


def fresh_changes(
    network: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    seed: int = 0,
    init: Init = "kaiming",
) -> dict[str, Change]:
    """New factors for training: A drawn, B zero, so that nothing changes yet.

    Args:
        network: a DiT or an adapter.
        targets: ends of the names of Linear layers ("q", "ffn.0"), as PEFT matches them, or "re:" and a
            regular expression for whole names.
        rank: r.
        alpha: None: r, so that the scale is 1.
        seed: of the draw.
        init: of A: "kaiming", as a Linear layer's weight is drawn, or "gaussian" of deviation 1 / r; both as
            in PEFT.

    Raises:
        ArgumentError: for a rank below 1, or a target that no Linear layer has; names it.
    """
    if rank < 1:
        raise ArgumentError(f"lora_rank is {rank}; give 1 or more (4 to 128 are usual).")
    generator = torch.Generator("cpu").manual_seed(seed)
    changes: dict[str, Change] = {}
    for name, layer in target_layers(linear_layers(network), targets).items():
        down = drawn(torch.empty(rank, layer.in_features), generator, init)
        changes[f"{name}.weight"] = LowRank(down, torch.zeros(layer.out_features, rank), alpha)
    return changes


def drawn(factor: Tensor, generator: torch.Generator, init: Init) -> Tensor:
    """Fill a factor (r, K) with numbers; see `fresh_changes`."""
    if init == "gaussian":
        return factor.normal_(std=1 / len(factor), generator=generator)
    bound = 1 / math.sqrt(factor.shape[1])
    return factor.uniform_(-bound, bound, generator=generator)


def linear_layers(network: nn.Module) -> dict[str, AnyLinear]:
    """Every Linear layer of a network by its name, whatever is attached to it."""
    return {
        n: m
        for n, m in network.named_modules()
        if isinstance(m, (nn.Linear, Fp8Linear, LoRALinear)) and not n.endswith(".base")
    }


def target_layers(layers: Mapping[str, AnyLinear], targets: Sequence[str]) -> dict[str, AnyLinear]:
    """Those of ``layers`` that ``targets`` name; see `fresh_changes`."""

    def fits(name: str, target: str) -> bool:
        if target.startswith(REGEX):
            return re.fullmatch(target.removeprefix(REGEX), name) is not None
        return name == target or name.endswith(f".{target}")

    if lost := [target for target in targets if not any(fits(name, target) for name in layers)]:
        raise ArgumentError(
            f"No Linear layer's name ends in {', '.join(lost)}; names are such as "
            f"{', '.join(list(layers)[:4])}."
        )
    return {name: layer for name, layer in layers.items() if any(fits(name, t) for t in targets)}

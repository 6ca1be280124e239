"""Which tensors of a DiT and its adapters train, and in which form.

LoRA, DoRA and LoKr put small factors beside Linear layers by `lora.attach`, the code that `load_lora` uses;
the layers themselves stay frozen, in any dtype, on any device, streamed or not. "full" trains networks as a
whole, "parts" those tensors that are named. All that trains is float32, except under stochastic rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from diffsynth.checkpoints.saving import save_tensors
from diffsynth.errors import ArgumentError, IncompleteCheckpointError, LoRAError
from diffsynth.lora.attach import REGEX, Dial, LoRABranch, LoRALinear, attach, attached_layers, detach
from diffsynth.lora.changes import Change, LowRank
from diffsynth.lora.dialects import DIALECTS, lora_tensors
from diffsynth.lora.formats import LayerChange, LoRA
from diffsynth.lora.names import diffusers_name
from diffsynth.ops.fp8 import Fp8Linear, fp8_layers
from diffsynth.training.factors import fresh_factors
from diffsynth.training.masters import StochasticRounding, keep_masters

Kind = Literal["lora", "dora", "lokr", "full", "parts"]
DEFAULT_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # as v1: of self- and cross-attention alike
KINDS = ("lora", "dora", "lokr", "full", "parts")
WITH_FACTORS = ("lora", "dora", "lokr")
# parts of a change -> how the trained tensor is called behind its layer's name: v1's (PEFT's) names
_SUFFIXES = {
    "down": "lora_A.default.weight", "up": "lora_B.default.weight",
    "inner_down": "lora_A.default.weight", "inner_up": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
    "w1": "lokr_w1", "w2": "lokr_w2", "w2_0": "lokr_w2_a", "w2_1": "lokr_w2_b",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """What of the loaded networks trains. Units stand beside each field."""

    kind: Kind = "lora"  # lora, dora, lokr: factors beside layers; full: whole networks; parts: named tensors
    fresh: bool = False  # of full: weights are drawn anew from `seed`, the DiT's file tells its sizes alone
    networks: tuple[str, ...] = ("dit",)  # for all but "parts": "dit", an adapter's name, "adapters" for all
    rank: int = 32  # width of the two small matrices; 4 to 128
    alpha: float | None = None  # the update is scaled by alpha / rank; empty: rank, so that the scale is 1
    targets: tuple[str, ...] = DEFAULT_TARGETS  # ends of layers' names, or "re:" and a regular expression
    init: Literal["kaiming", "gaussian"] = "kaiming"  # of A; B is zero
    seed: int = 0  # of what is drawn
    factor: int | None = None  # of lokr: rows of the first matrix at most; empty: as square as it goes
    parts: tuple[str, ...] = ()  # "dit", "vace", "adapters", or "re:" and a regular expression for tensors
    rounding: Literal["masters", "stochastic"] = "masters"  # of bfloat16 weights that train; see `masters`

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("init", self.init, ("kaiming", "gaussian")),
            ("rounding", self.rounding, ("masters", "stochastic")),
        ):
            if value not in known:
                raise ArgumentError(f"tune.{name} is {value!r}; known: {', '.join(known)}.")
        if self.rank < 1:
            raise ArgumentError(f"lora_rank is {self.rank}; give 1 or more (4 to 128 are usual).")
        if self.alpha is not None and not self.alpha > 0:
            raise ArgumentError(f"lora_alpha is {self.alpha}; give a number above 0 (the rank is usual).")
        if self.factor is not None and self.factor < 2:
            raise ArgumentError(f"tune.factor is {self.factor}; give 2 or more (8 and 16 are usual).")
        if self.kind in WITH_FACTORS and not self.targets:
            raise ArgumentError("tune.targets is empty; name layers, such as q k v o ffn.0 ffn.2.")
        _check_patterns((*self.targets, *self.parts))
        if self.fresh and (self.kind, self.networks) != ("full", ("dit",)):
            raise ArgumentError(
                f"tune.fresh is on, kind {self.kind!r} and networks {list(self.networks)}; only a DiT that "
                "trains in full, without adapters, can begin anew."
            )
        if (self.kind == "parts") != bool(self.parts):
            raise ArgumentError(
                f"tune.kind is {self.kind!r} and parts is {list(self.parts)}; kind 'parts' needs parts, and "
                "no other kind reads them."
            )


def _check_patterns(names: Sequence[str]) -> None:
    for name in names:
        if name.startswith(REGEX):
            try:
                re.compile(name.removeprefix(REGEX))
            except re.error as error:
                raise ArgumentError(f"{name!r} is no regular expression: {error}.") from None


class Tuned:
    """What trains of a DiT and its adapters; made by `tune`."""

    def __init__(self, config: TuneConfig, networks: Mapping[str, nn.Module]) -> None:
        self.config = config
        self.rounding: StochasticRounding | None = None  # set where the optimizer must step through it
        self._networks = dict(networks)
        self._dial = Dial("training")
        self._trained: dict[str, nn.Parameter] = {}
        self._undo: list[Callable[[], None]] = []
        self._frozen = [(p, p.requires_grad) for network in networks.values() for p in network.parameters()]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self._trained.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, as it stands in the networks, by name.

        Factors go by v1's names ("blocks.0.self_attn.q.lora_A.default.weight"), whole tensors by their
        official ones. float32; bfloat16 under stochastic rounding, where the optimizer is made for
        ``rounding.parameters()`` and stepped by ``rounding.step``.
        """
        return dict(self._trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors, detached, not copied."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the trained tensors of an earlier run.

        Raises:
            IncompleteCheckpointError: when names or shapes differ: of another model, rank or choice of
                targets. Nothing is changed then.
        """
        own = self._trained
        faults = {
            "tensors are missing": [name for name in own if name not in state],
            "tensors do not train here": [name for name in state if name not in own],
            "tensors have another shape": [n for n in own if n in state and own[n].shape != state[n].shape],
        }
        for fault, names in faults.items():
            if names:
                raise IncompleteCheckpointError("The state", f"of {self._title}", len(state), fault, names)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def start_from(self, lora: LoRA) -> None:
        """Begin with the factors of a LoRA file instead of fresh ones.

        Raises:
            LoRAError: when it has other layers, another rank or another kind of change.
        """
        if self.config.kind != "lora":
            raise LoRAError(f"{lora.source}: a LoRA cannot be the start of kind {self.config.kind!r}.")
        state = {}
        for layer, change in self._layers().items():
            given = lora.layers.get(layer)
            weight, own = None if given is None else given.weight, cast("LowRank", change.weight)
            if not isinstance(weight, LowRank) or weight.rank != own.rank:
                found = "nothing" if weight is None else f"rank {weight.rank}"
                raise LoRAError(f"{lora.source} has {found} for {layer}; expected a LoRA of rank {own.rank}.")
            state[f"{layer}.{_SUFFIXES['down']}"] = weight.down
            state[f"{layer}.{_SUFFIXES['up']}"] = weight.up.float() * (weight.scale / own.scale)
        if more := sorted(set(lora.layers) - set(self._layers())):
            raise LoRAError(f"{lora.source} has {len(more)} layers that do not train here: {more[0]}.")
        self.load_state_dict(state)

    def to(self, device: torch.device) -> None:
        """Move what trains to the device of the computation; what is frozen stays where it is."""
        for parameter in self._trained.values():
            parameter.data = parameter.data.to(device)

    def export(
        self, path: Path, export_format: str = "comfy", metadata: Mapping[str, str] | None = None
    ) -> Path:
        """Write what was trained, for others to load.

        Args:
            path: of the safetensors file; one of this name is replaced.
            export_format: of factors: "comfy", "kohya", "diffusers" or "peft". Whole networks have one form:
                every network of which a tensor trained, with all its tensors under official names.
            metadata: texts for its header.

        Raises:
            LoRAError: for layers or a kind of change that the format cannot name.
            ArgumentError: for an unknown format.
        """
        texts = {"format": "pt", **(metadata or {})}
        if self.config.kind not in WITH_FACTORS:
            save_tensors(path, self._whole_networks(), texts)
            return path
        tensors, about = self._factors(export_format)
        save_tensors(path, {n: t.detach().cpu().clone() for n, t in tensors.items()}, {**about, **texts})
        return path

    def require_format(self, export_format: str) -> None:
        """Say before the first step what `export` would say after the last one; raises as it does."""
        if self.config.kind in WITH_FACTORS:
            self._factors(export_format)
        elif export_format != DIALECTS[0]:
            raise ArgumentError(
                f"export_format is {export_format!r}, which is for LoRAs, and tune.kind is "
                f"{self.config.kind!r}: networks are written under their official names. Leave it out."
            )

    def _factors(self, export_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Trained factors under the names of a dialect, and what the header says of them."""
        if export_format not in DIALECTS:
            raise ArgumentError(f"export_format is {export_format!r}; known: {', '.join(DIALECTS)}.")
        layers = self._layers()
        rank, alpha = self.config.rank, self._alpha
        texts = {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
        if export_format == "diffusers":
            # It asks for alpha in the header, and would take keys named .alpha for weights.
            names = [diffusers_name(layer) or layer for layer in layers]
            told = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(names), "use_dora": False}
            texts["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in told.items()})
            layers = {
                layer: replace(change, weight=replace(change.weight, alpha=None))
                if isinstance(change.weight, LowRank)
                else change
                for layer, change in layers.items()
            }
        lora = LoRA(layers=layers, dialect=export_format, source=self._title)
        return lora_tensors(lora, export_format), texts

    def detach(self) -> None:
        """Give the networks back: without factors and masters, the very layers that were there before.

        Whole tensors that trained keep what they learnt, in the dtype that they had.
        """
        for network in self._networks.values():
            detach(network, self._dial)
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._trained = {}
        for parameter, wanted in self._frozen:
            parameter.requires_grad_(wanted)

    def put_beside(self, network: nn.Module, changes: Mapping[str, Change]) -> None:
        """Attach factors; for `tune`."""
        attach(network, changes, self._dial, dtype=torch.float32, trains=True)
        for path, layer in network.named_modules():
            for branch in layer.branches if isinstance(layer, LoRALinear) else ():
                if isinstance(branch, LoRABranch) and branch.dial is self._dial:
                    self._add({f"{path}.{_SUFFIXES[n]}": p for n, p in branch.named_parameters()})

    def train_whole(self, network: nn.Module, names: Sequence[str]) -> None:
        """Let tensors of a network train; for `tune`."""
        own = dict(network.named_parameters())
        chosen = {name: own[name] for name in names}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        if self.config.rounding == "masters":
            self._undo.append(keep_masters(network, chosen))
        self._add(chosen)

    def finish(self) -> None:
        """All that trains is known; for `tune`."""
        narrow = {n: p for n, p in self._trained.items() if p.dtype != torch.float32}
        if narrow:
            self.rounding = StochasticRounding(narrow)

    @property
    def _title(self) -> str:
        return f"{self.config.kind} training of {', '.join(self._networks)}"

    @property
    def _alpha(self) -> float:
        return float(self.config.rank if self.config.alpha is None else self.config.alpha)

    def _add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        assert not set(parameters) & set(self._trained), "two networks name a tensor alike"
        self._trained |= parameters

    def _layers(self) -> dict[str, LayerChange]:
        return {
            n: c
            for network in self._networks.values()
            for n, c in attached_layers(network, self._dial).items()
        }

    def _whole_networks(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        trained = {id(p) for p in self._trained.values()}
        for network in self._networks.values():
            if any(id(p) in trained for p in network.parameters()):
                found |= official_state(network)
        return found


def official_state(network: nn.Module) -> dict[str, Tensor]:
    """All tensors of a network under their official names, masters rounded to the network's dtype."""
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer, is_master, rest = name.partition("parametrizations.")
        if is_master:
            leaf = rest.split(".")[0]
            holder = network.get_submodule(layer.removesuffix("."))
            found[layer + leaf] = getattr(holder, leaf).detach()
        else:
            found[name] = tensor
    return found


def tune(dit: nn.Module, adapters: Sequence[nn.Module], config: TuneConfig) -> Tuned:
    """Freeze a DiT and its adapters, but for what ``config`` names.

    Called before the weights are streamed: tensors that train are no part of a stream.

    Args:
        dit: the DiT; its Linear layers may be fp8, except for "full" and "parts".
        adapters: beside it, each with its ``name``.
        config: what trains.

    Raises:
        ArgumentError: for a network, target or part that is not there (nothing is changed then), or weights
            in fp8 that shall train.
    """
    networks = {"dit": dit, **{str(adapter.name): adapter for adapter in adapters}}
    if config.kind in WITH_FACTORS:
        chosen = {name: networks[name] for name in _network_names(config.networks, networks)}
        changes = fresh_factors(list(chosen.values()), config)
        tuned = Tuned(config, networks)
        for network, some in zip(chosen.values(), changes, strict=True):
            tuned.put_beside(network, some)
    else:
        names = _tensor_names(config, networks)
        if config.fresh:
            draw_anew(dit, config.seed)
        tuned = Tuned(config, networks)
        for name, tensors in names.items():
            tuned.train_whole(networks[name], tensors)
    tuned.finish()
    return tuned


def draw_anew(dit: nn.Module, seed: int) -> None:
    """Give a DiT the weights of one that has learnt nothing: PyTorch's, and a head of zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(dit)(dit.config)
    nn.init.zeros_(fresh.get_submodule("head.head").weight)  # type: ignore[arg-type]
    dit.load_state_dict(fresh.state_dict())


def _network_names(wanted: Sequence[str], networks: Mapping[str, nn.Module]) -> list[str]:
    names: list[str] = []
    for name in wanted:
        found = [n for n in networks if n == name or (name == "adapters" and n != "dit")]
        if not found:
            raise ArgumentError(
                f"There is no {name!r} to train; loaded: {', '.join(networks)}. Load the model that holds it."
            )
        names += [n for n in found if n not in names]
    return names


def _tensor_names(config: TuneConfig, networks: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Network -> names of its tensors that train."""
    patterns = [part.removeprefix(REGEX) for part in config.parts if part.startswith(REGEX)]
    wanted = (
        config.networks if config.kind == "full" else [p for p in config.parts if not p.startswith(REGEX)]
    )
    whole = _network_names(wanted, networks)
    found = {name: [n for n, _ in networks[name].named_parameters()] for name in whole}
    for pattern in patterns:
        fits = {
            name: [n for n, _ in network.named_parameters() if re.fullmatch(pattern, n)]
            for name, network in networks.items()
        }
        if not any(fits.values()):
            first = [n for n, _ in networks["dit"].named_parameters()][:3]
            raise ArgumentError(
                f"No tensor's name matches {pattern!r} as a whole; names are such as {', '.join(first)}."
            )
        for name, some in fits.items():
            if some:
                found[name] = list(dict.fromkeys([*found.get(name, []), *some]))
    for name, some in found.items():
        layers = fp8_layers(networks[name])
        narrow = {id(layer.weight) for layer in layers if isinstance(layer, Fp8Linear)}
        stored = [n for n, p in networks[name].named_parameters() if n in some and id(p) in narrow]
        if stored:
            raise ArgumentError(
                f"{stored[0]} of {name} is kept in fp8, which cannot train. Load the model in bfloat16, or "
                "train a LoRA beside it."
            )
    return found

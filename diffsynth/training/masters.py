"""Weights in bfloat16 that all train: how small updates survive.

A bfloat16 number has 8 bits of mantissa, and an update below 1/512 of a weight is lost when it is rounded to
the nearest. There are two ways out:

- float32 masters (`keep_masters`): the trained tensors are float32 parameters, and the network computes on
  their bfloat16 rounding. 16 bytes a parameter with AdamW (4 master, 4 gradient, 8 moments), and nothing is
  lost.
- stochastic rounding (`StochasticRounding`): the parameters stay bfloat16, each step is computed in float32
  and rounded up or down by chance, with the right mean. 12 bytes a parameter with AdamW (2 weight, 2
  gradient, 8 moments); the gradient is rounded, and every update carries noise of the size of a rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffsynth.errors import ArgumentError

ROOM_NUMBERS = 250_000_000  # float32 numbers that are worked on at a time: 1 GB, and 1 GB of gradients


class _Rounded(nn.Module):
    """What the network reads instead of a master."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        """The master in the dtype of the network."""
        return master.to(self.dtype)


def keep_masters(network: nn.Module, names: Mapping[str, nn.Parameter]) -> Callable[[], None]:
    """Make these parameters float32; the network goes on reading them in the dtype that they had.

    Args:
        network: gets it in place.
        names: its parameters by name; the very objects stay its parameters.

    Returns:
        What takes the masters away again: the network keeps their rounding.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter, torch.dtype]] = []
    for name, parameter in names.items():
        if parameter.dtype == torch.float32:
            continue
        parent, _, leaf = name.rpartition(".")
        holder, dtype = network.get_submodule(parent), parameter.dtype
        parameter.data = parameter.data.float()
        parametrize.register_parametrization(holder, leaf, _Rounded(dtype), unsafe=True)
        kept.append((holder, leaf, parameter, dtype))

    def undo() -> None:
        for holder, leaf, parameter, dtype in kept:
            parametrize.remove_parametrizations(holder, leaf, leave_parametrized=False)
            parameter.grad = None  # of another dtype
            parameter.data = parameter.data.to(dtype)

    return undo


class StochasticRounding:
    """Steps an optimizer in float32 and rounds what it did to bfloat16 by chance.

    The optimizer is made for `parameters`: float32 stand-ins that have numbers only while they are stepped, a
    gigabyte at a time. So it must treat each tensor for itself (AdamW, 8-bit Adam, Lion, Adafactor do);
    Prodigy and D-Adaptation, which estimate one number from all tensors, want float32 masters.

    Args:
        weights: bfloat16 parameters by name.

    Raises:
        ArgumentError: for a parameter that is not bfloat16; names it.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        if wrong := [name for name, weight in weights.items() if weight.dtype != torch.bfloat16]:
            raise ArgumentError(
                f"{wrong[0]} is {weights[wrong[0]].dtype}; stochastic rounding is for bfloat16 weights. Use "
                "masters."
            )
        self._weights = dict(weights)
        self._stand_ins = {
            name: nn.Parameter(torch.empty(0, dtype=torch.float32, device=weight.device))
            for name, weight in weights.items()
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer is made for, by the names of the weights."""
        return dict(self._stand_ins)

    def step(self, step_optimizer: Callable[[], object], seed: int, step: int) -> None:
        """Take one step of the optimizer on all weights that have a gradient, and let the gradients go.

        Args:
            step_optimizer: its ``step``, without a closure.
            seed: of the run.
            step: number of this step; with the seed and a weight's name it decides how that is rounded.
        """
        room: list[str] = []
        size = 0
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            if room and size + weight.numel() > ROOM_NUMBERS:
                self._step_some(room, step_optimizer, seed, step)
                room, size = [], 0
            room.append(name)
            size += weight.numel()
        if room:
            self._step_some(room, step_optimizer, seed, step)

    @torch.no_grad()
    def _step_some(
        self, names: list[str], step_optimizer: Callable[[], object], seed: int, step: int
    ) -> None:
        for name in names:
            weight, stand_in = self._weights[name], self._stand_ins[name]
            assert weight.grad is not None
            stand_in.data = weight.float()
            stand_in.grad = weight.grad.float()
            weight.grad = None
        try:
            step_optimizer()
            for name in names:
                weight, stand_in = self._weights[name], self._stand_ins[name]
                digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
                generator = torch.Generator(weight.device)
                generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                weight.copy_(rounded_by_chance(stand_in.data, generator))
        finally:
            for name in names:
                stand_in = self._stand_ins[name]
                stand_in.grad, stand_in.data = None, stand_in.data.new_empty(0)


def rounded_by_chance(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down, each as likely as it is near; the mean is the number itself.

    The lower 16 bits of a float32 are what bfloat16 lacks: a random number of 16 bits is added to them, and
    they are cut off. Infinity and NaN stay what they are.
    """
    bits = numbers.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = ((bits + chance) & -65536).view(torch.float32)
    return torch.where(numbers.isfinite(), rounded, numbers).to(torch.bfloat16)

"""Fresh factors of LoRA, DoRA and LoKr: drawn on the CPU from a seed, and changing nothing yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from diffsynth.lora.attach import AnyLinear, Init, drawn, linear_layers, target_layers
from diffsynth.lora.changes import Change, Decomposed, Kronecker, LowRank
from diffsynth.ops.fp8 import Fp8Linear


class FactorChoice(Protocol):
    """What is read of a `TuneConfig`."""

    @property
    def kind(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float | None: ...

    @property
    def targets(self) -> Sequence[str]: ...

    @property
    def init(self) -> Init: ...

    @property
    def seed(self) -> int: ...

    @property
    def factor(self) -> int | None: ...


def fresh_factors(networks: Sequence[nn.Module], choice: FactorChoice) -> list[dict[str, Change]]:
    """Draw factors for the target layers of each network: changes by the name of the weight.

    Raises:
        ArgumentError: for a target that no Linear layer of any network has.
    """
    layers = [linear_layers(network) for network in networks]
    wanted = target_layers({n: layer for some in layers for n, layer in some.items()}, choice.targets)
    generator = torch.Generator("cpu").manual_seed(choice.seed)
    return [
        {f"{n}.weight": fresh_change(layer, choice, generator) for n, layer in some.items() if n in wanted}
        for some in layers
    ]


def fresh_change(layer: AnyLinear, choice: FactorChoice, generator: torch.Generator) -> Change:
    """One layer's factors, float32 on the CPU (a DoRA's magnitude where the weight is)."""
    rows, columns, rank = layer.out_features, layer.in_features, choice.rank
    alpha = float(rank if choice.alpha is None else choice.alpha)
    if choice.kind == "lokr":
        return _fresh_kronecker((rows, columns), rank, alpha, choice, generator)
    down = drawn(torch.empty(rank, columns), generator, choice.init)
    change = LowRank(down, torch.zeros(rows, rank), alpha)
    return change if choice.kind == "lora" else Decomposed(change, row_lengths(layer))


def _fresh_kronecker(
    shape: tuple[int, int], rank: int, alpha: float, choice: FactorChoice, generator: torch.Generator
) -> Kronecker:
    """kron(w1, w2) of the layer's shape; w2 is a product of two where that is smaller, else whole.

    Source: LyCORIS ``modules/lokr.py``.
    """
    (n1, n2), (k1, k2) = (factorised(size, choice.factor) for size in shape)
    w1 = drawn(torch.empty(n1, k1), generator, "kaiming")
    if rank * (n2 + k2) < n2 * k2:
        first = drawn(torch.empty(n2, rank), generator, "kaiming")
        return Kronecker(w1, (first, torch.zeros(rank, k2)), alpha)
    return Kronecker(w1, torch.zeros(n2, k2), alpha)


def factorised(size: int, factor: int | None) -> tuple[int, int]:
    """Split a size into two whole factors, the smaller first, at most ``factor`` (None: its root)."""
    limit = min(math.isqrt(size), factor or size)
    first = next(n for n in range(limit, 0, -1) if size % n == 0)
    return first, size // first


def row_lengths(layer: AnyLinear) -> Tensor:
    """The length of each row of a layer's weight, (N,) float32: where a DoRA's magnitude begins.

    Of an outline, whose weights are no numbers, the lengths are 1.
    """
    with torch.no_grad():
        weight = layer.widened(torch.float32) if isinstance(layer, Fp8Linear) else layer.weight
        if weight.is_meta:
            return torch.ones(weight.shape[0])
        lengths: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return lengths

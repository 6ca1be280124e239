"""What a LoRA file does to one weight: a few kinds of change, each a formula of small factors.

Letters: N outputs (rows), K inputs (columns), r rank. A weight with more than two axes is seen as (N, K) with
its other axes in K; one with a single axis as (1, N). scale = alpha / r where the file has an alpha, else 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

Kind = TypeVar("Kind")
CPU_PIECE_BYTES = 4 << 20  # float32 bytes of the rows that are worked on at a time
GPU_PIECE_BYTES = 64 << 20


class Sum(Protocol):
    """A change of one weight that does not depend on it, before the user's strength."""

    @property
    def rank(self) -> int | None:
        """r, or None where there is none."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight that it fits."""

    def add_to(self, rows: Tensor, where: slice, strength: float) -> None:
        """Add strength * change[where] to ``rows``, (n, K) of any wide dtype, in place."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """Scale * up @ down: LoRA itself."""

    down: Tensor  # (r, K), or (r, C, ...) of a convolution
    up: Tensor  # (N, r), or (N, r, 1, ...)
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down[0].numel()

    def add_to(self, rows: Tensor, where: slice, strength: float) -> None:
        up, down = self.up.flatten(1)[where].to(rows.dtype), self.down.flatten(1).to(rows.dtype)
        rows.addmm_(up, down, alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """Scale * (w1_a @ w1_b) o (w2_a @ w2_b): LoHa. Source: LyCORIS ``modules/loha.py``."""

    w1_a: Tensor  # (N, r)
    w1_b: Tensor  # (r, K)
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def add_to(self, rows: Tensor, where: slice, strength: float) -> None:
        kind = rows.dtype
        first = self.w1_a[where].to(kind) @ self.w1_b.to(kind)
        first *= self.w2_a[where].to(kind) @ self.w2_b.to(kind)
        rows.add_(first, alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """Scale * kron(w1, w2): LoKr. Either matrix may be the product of two, and r is that of the second such.

    Two whole matrices have no r, and their alpha says nothing. Source: LyCORIS ``modules/lokr.py``.
    """

    w1: Tensor | tuple[Tensor, Tensor]  # (N1, K1), or (N1, r) and (r, K1)
    w2: Tensor | tuple[Tensor, Tensor]
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        pairs = [pair for pair in (self.w1, self.w2) if isinstance(pair, tuple)]
        return int(pairs[-1][1].shape[0]) if pairs else None

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        (n1, k1), (n2, k2) = (
            (w[0].shape[0], w[1].shape[1]) if isinstance(w, tuple) else (w.shape[0], w[0].numel())
            for w in (self.w1, self.w2)
        )
        return n1 * n2, k1 * k2

    def add_to(self, rows: Tensor, where: slice, strength: float) -> None:
        w1, w2 = _whole(self.w1, rows.dtype), _whole(self.w2, rows.dtype)
        index = torch.arange(w1.shape[0] * w2.shape[0], device=rows.device)[where]
        first, second = w1[index // w2.shape[0]], w2[index % w2.shape[0]]
        rows.add_((first[:, :, None] * second[:, None, :]).flatten(1), alpha=strength * self.scale)


def _whole(matrix: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    if isinstance(matrix, tuple):
        return matrix[0].to(dtype) @ matrix[1].to(dtype)
    return matrix.flatten(1).to(dtype)


@dataclass(frozen=True, eq=False)
class Difference:
    """The change itself, of the weight's shape: ``.diff``."""

    diff: Tensor

    @property
    def rank(self) -> None:
        return None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = as_matrix(self.diff).shape
        return rows, columns

    def add_to(self, rows: Tensor, where: slice, strength: float) -> None:
        rows.add_(as_matrix(self.diff)[where].to(rows.dtype), alpha=strength)


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: the weight and a change together, each row (or column) rescaled to a learned length.

    change = gain * (W + inner) - W with gain = magnitude / |W + inner|, the lengths taken over a row where
    ``magnitude`` has N numbers in a column, over a column where it has the shape (1, K). Source: the DoRA
    paper, eq. 5 (arXiv 2402.09353); LyCORIS ``wd_on_out``, PEFT ``lora_magnitude_vector``.
    """

    inner: Sum
    magnitude: Tensor  # (N,), (N, 1) or (1, K)

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def is_per_row(self) -> bool:
        """Whether each row has a length, and not each column."""
        return self.magnitude.ndim == 1 or self.magnitude.shape[0] == self.shape[0]

    def gain(self, weight: Tensor) -> Tensor:
        """(N, 1) or (1, K) in the dtype of the original ``weight`` (N, K), float32 at least."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        squares = torch.zeros(self.shape[not self.is_per_row], dtype=kind, device=weight.device)
        for where in row_pieces(weight):
            rows = weight[where].to(kind, copy=True)
            self.inner.add_to(rows, where, 1.0)
            if self.is_per_row:
                squares[where] = rows.square().sum(1)
            else:
                squares += rows.square().sum(0)
        lengths = squares.sqrt().clamp_(min=torch.finfo(kind).tiny)
        gain = self.magnitude.to(weight.device, kind).flatten() / lengths
        return gain[:, None] if self.is_per_row else gain[None]


Change = Sum | Decomposed


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as (N, K): a vector becomes one row, further axes go into the columns."""
    return weight[None] if weight.ndim == 1 else weight.flatten(1)


def row_pieces(matrix: Tensor) -> Iterator[slice]:
    """Rows that are worked on at a time, so that what is float32 on the way stays small."""
    budget = CPU_PIECE_BYTES if matrix.device.type == "cpu" else GPU_PIECE_BYTES
    step = max(1, budget // (4 * max(1, matrix.shape[1])))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def tensors_of(change: Change) -> dict[str, Tensor]:
    """The tensors of a change, by a name that says where each stands."""
    found: dict[str, Tensor] = {}
    for item in fields(change):  # type: ignore[arg-type]
        value = getattr(change, item.name)
        if isinstance(value, Tensor):
            found[item.name] = value
        elif isinstance(value, tuple):
            found |= {f"{item.name}_{index}": part for index, part in enumerate(value)}
        elif hasattr(value, "add_to"):
            found |= {f"{item.name}_{name}": part for name, part in tensors_of(value).items()}
    return found


def with_tensors(change: Kind, tensors: Mapping[str, Tensor], start: str = "") -> Kind:
    """The same formula with these tensors, named as `tensors_of` does."""
    new: dict[str, object] = {}
    for item in fields(change):  # type: ignore[arg-type]
        value, name = getattr(change, item.name), start + item.name
        if isinstance(value, Tensor):
            new[item.name] = tensors[name]
        elif isinstance(value, tuple):
            new[item.name] = tuple(tensors[f"{name}_{index}"] for index in range(len(value)))
        elif hasattr(value, "add_to"):
            new[item.name] = with_tensors(value, tensors, f"{name}_")
    return replace(change, **new)  # type: ignore[type-var]


def moved(change: Kind, device: torch.device, dtype: torch.dtype | None = None) -> Kind:
    """The same change with its tensors elsewhere, or in another dtype."""
    tensors = tensors_of(cast("Change", change))
    return with_tensors(change, {name: t.to(device, dtype) for name, t in tensors.items()})


def changed(original: Tensor, changes: Sequence[tuple[Change, float]], dtype: torch.dtype) -> Tensor:
    """Return original + the sum of strength * change, in new memory.

    The arithmetic is float32, or float64 for a float64 weight. Rows are worked on some at a time: only the
    result takes memory of the weight's size.

    Args:
        original: the weight without any LoRA, of any shape; only read.
        changes: with their strengths; they fit the weight.
        dtype: of the result.
    """
    out = torch.empty(original.shape, dtype=dtype, device=original.device)
    matrix = as_matrix(out)
    for where, rows in changed_rows(original, changes):
        matrix[where] = rows
    return out


def changed_rows(original: Tensor, changes: Sequence[tuple[Change, float]]) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of (N, K) and what `changed` makes of them, in float32, or float64 for a float64 weight."""
    matrix = as_matrix(original)
    work = torch.promote_types(original.dtype, torch.float32)
    ready = [(moved(change, original.device, work), strength) for change, strength in changes]
    gains = {i: c.gain(matrix) for i, (c, _) in enumerate(ready) if isinstance(c, Decomposed)}
    for where in row_pieces(matrix):
        rows = matrix[where].to(work, copy=True)
        start = rows.clone() if gains else rows
        for index, (change, strength) in enumerate(ready):
            if isinstance(change, Decomposed):
                whole = start.clone()
                change.inner.add_to(whole, where, 1.0)
                gain = gains[index].to(work)
                whole *= gain[where] if change.is_per_row else gain
                rows.add_(whole.sub_(start), alpha=strength)
            else:
                change.add_to(rows, where, strength)
        yield where, rows


def delta(change: Change, original: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The change at strength 1, of the weight's shape; only DoRA reads the original's numbers."""
    if isinstance(change, Decomposed):
        wide = original.to(dtype)
        return changed(wide, [(change, 1.0)], dtype) - wide
    return changed(torch.zeros_like(original, dtype=dtype), [(change, 1.0)], dtype)


def rank_of(change: Change) -> str:
    """For reports: "rank 32", "LoKr rank 4", "whole"."""
    names = {LowRank: "", Hadamard: "LoHa ", Kronecker: "LoKr ", Difference: ""}
    inner, kind = (change.inner, "DoRA ") if isinstance(change, Decomposed) else (change, "")
    kind += names[type(inner)]
    return f"{kind}rank {inner.rank}" if inner.rank is not None else f"{kind}whole"

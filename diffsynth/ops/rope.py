"""Rotary position embedding over time, height and width.

Letters: L tokens, N heads, d size of a head.
A head's d / 2 pairs (elements 2 j and 2 j + 1 are one complex number) are split into d - 4 (d // 6) elements
for time and 2 (d // 6) each for height and width: 22, 21 and 21 pairs for d = 128. A pair is turned by
position x 10000^(-2 j / size of its part). Angles are computed in float64 once per grid and kept as float32
cosine and sine: rotating in float32 then stays within 1e-6 of the official complex128 form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Elements of a head that follow time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def axis_rotation(positions: Tensor, size: int) -> Tensor:
    """Cosine and sine for one axis: positions (n,), also negative -> (n, size / 2, 2) float32."""
    frequencies = THETA ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = positions.double()[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def grid_rotation(
    frames: Sequence[float] | Tensor,
    rows: Sequence[float] | Tensor,
    columns: Sequence[float] | Tensor,
    head_dim: int,
) -> Tensor:
    """Rotations of every token of a grid, ordered frame by frame, row by row: (L, 1, d / 2, 2) float32."""
    axes = [torch.as_tensor(p, dtype=torch.float64) for p in (frames, rows, columns)]
    turns = [axis_rotation(p, size) for p, size in zip(axes, axis_sizes(head_dim), strict=True)]
    f, h, w = (len(p) for p in axes)
    parts = [
        turns[0][:, None, None].expand(f, h, w, -1, 2),
        turns[1][None, :, None].expand(f, h, w, -1, 2),
        turns[2][None, None, :].expand(f, h, w, -1, 2),
    ]
    return torch.cat(parts, dim=3).reshape(f * h * w, 1, -1, 2)


@lru_cache(maxsize=4)
def video_rotation(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """`grid_rotation` of a video that starts at position 0 on each axis; the last few are kept."""
    frames, rows, columns = (range(n) for n in grid)
    return grid_rotation(frames, rows, columns, head_dim).to(device)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of x (..., L, N, d) by ``rotation`` (L, 1, d / 2, 2), in float32; returns x's dtype.

    As complex multiplication: one fused pass on every device, against four strided ones with cosine and sine
    apart.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(rotation)).flatten(-2).to(x.dtype)

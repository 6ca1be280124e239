"""Overlapping tiles of a picture and the masks that blend them without a seam.

Sizes are (height, width). A tile knows its place in latent positions; ``scale`` turns it into pixels.
Source of starts and ramps: DiffSynth v1 ``models/wan_video_vae.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One tile of a picture, in latent positions."""

    top: int
    left: int
    height: int
    width: int
    border: tuple[int, int]  # how far it overlaps its neighbours: rows, columns
    picture: tuple[int, int]  # height and width of the whole

    def region(self, scale: int = 1) -> tuple[slice, slice]:
        """Rows and columns, times ``scale``."""
        return (
            slice(self.top * scale, (self.top + self.height) * scale),
            slice(self.left * scale, (self.left + self.width) * scale),
        )

    def cut(self, whole: Tensor, scale: int = 1) -> Tensor:
        """This tile's part of ``whole``, (..., H, W)."""
        rows, columns = self.region(scale)
        return whole[..., rows, columns]


def tile_starts(length: int, size: int, stride: int) -> list[int]:
    """Where tiles begin along one axis; a tile is left out when the one before it already reaches the end.

    Raises:
        ArgumentError: when ``stride`` is not between 1 and ``size``.
    """
    if not 1 <= stride <= size:
        raise ArgumentError(
            f"tile_stride is {stride} with tile_size {size}; give 1 to {size} (half the size is usual)."
        )
    starts = []
    for start in range(0, length, stride):
        if start > 0 and start - stride + size >= length:
            break
        starts.append(start)
    return starts


def blend_mask(tile: Tile, *, scale: int, device: torch.device | str) -> Tensor:
    """Weights of a tile, (height x scale, width x scale) float32: ramps to neighbours, flat at edges."""
    rows = _ramp(tile.height, tile.border[0], tile.top > 0, tile.top + tile.height < tile.picture[0], scale)
    columns = _ramp(
        tile.width, tile.border[1], tile.left > 0, tile.left + tile.width < tile.picture[1], scale
    )
    return torch.minimum(rows[:, None], columns[None, :]).to(device)


def _ramp(length: int, border: int, before: bool, after: bool, scale: int) -> Tensor:
    weights = torch.ones(length * scale)
    width = min(border, length) * scale
    if width == 0:
        return weights
    rise = (torch.arange(width) + 1) / (border * scale)
    if before:
        weights[:width] = torch.minimum(weights[:width], rise)
    if after:
        weights[-width:] = torch.minimum(weights[-width:], rise.flip(0))
    return weights

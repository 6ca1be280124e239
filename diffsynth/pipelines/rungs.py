"""Ways to code a picture by the VAE: as a whole where that fits, else in tiles, else on the CPU.

Sizes are (height, width) in latent positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from diffsynth.errors import ArgumentError
from diffsynth.ops.out_of_memory import is_out_of_memory

logger = logging.getLogger("diffsynth")

V1_TILE_SIZE, V1_TILE_STRIDE = (30, 52), (15, 26)  # latent positions
SMALLEST_TILE = 8  # latent positions; smaller ones see too little of the picture


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the VAE is asked to go over a picture, as `pipe()` is told.

    Raises:
        ArgumentError: when tiles are empty or would leave out parts of the picture.
    """

    tiled: bool | None = None  # None: in tiles where the whole does not fit
    tile_size: tuple[int, int] | None = None  # height and width in latent positions; v1's 30 x 52
    tile_stride: tuple[int, int] | None = None  # from one tile to the next; half the size

    def __post_init__(self) -> None:
        for name, pair in (("tile_size", self.size), ("tile_stride", self.stride)):
            if len(pair) != 2 or min(pair) < 1:
                raise ArgumentError(
                    f"{name} is {pair}; give height and width in latent positions, such as {V1_TILE_SIZE}."
                )
        if any(s > t for s, t in zip(self.stride, self.size, strict=True)):
            raise ArgumentError(
                f"tile_stride {self.stride} is larger than tile_size {self.size}: parts of the picture would "
                "be left out."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Of a tile, in latent positions."""
        return self.tile_size or V1_TILE_SIZE

    @property
    def stride(self) -> tuple[int, int]:
        """From one tile to the next, in latent positions."""
        if self.tile_stride or not self.tile_size:
            return self.tile_stride or V1_TILE_STRIDE
        return tuple(max(1, edge // 2) for edge in self.tile_size)  # type: ignore[return-value]

    def starts_tiled(self, precision: str) -> bool | None:
        """``tiled``, which "v1" takes for True where it was left open."""
        return True if self.tiled is None and precision == "v1" else self.tiled


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One way to code."""

    tile_size: tuple[int, int] | None = None  # None: the whole picture
    tile_stride: tuple[int, int] = V1_TILE_STRIDE
    has_sums_on_host: bool = False  # where tiles are added up: host memory, or the device
    is_on_cpu: bool = False

    def __str__(self) -> str:
        if self.tile_size is None:
            return f"the whole picture{' on the CPU' if self.is_on_cpu else ''}"
        return "tiles of {} x {}".format(*self.tile_size)


def ladder(
    tiling: Tiling, latent_size: tuple[int, int], device: torch.device, *, tiled_by_plan: bool = False
) -> list[Rung]:
    """Return the ways to code, in the order in which they are tried when memory runs out.

    The whole picture, tiles, tiles of half the edge with their sums in host memory, the CPU. ``tiled=True``
    begins with tiles; ``tiled=False`` is the first rung alone.

    Args:
        tiling: what was asked.
        latent_size: h and w; tiles that would not cut the picture are left out.
        device: where the VAE computes.
        tiled_by_plan: it was calculated that the whole does not fit, so it is not tried.
    """

    def cuts(size: tuple[int, int]) -> bool:
        return any(edge < length for edge, length in zip(size, latent_size, strict=True))

    if tiling.tiled is False:
        return [Rung()]
    starts_with_tiles = tiling.tiled or (tiled_by_plan and cuts(tiling.size))
    rungs = [] if starts_with_tiles else [Rung()]
    if starts_with_tiles or cuts(tiling.size):
        rungs.append(Rung(tile_size=tiling.size, tile_stride=tiling.stride))
    height, width = (min(edge, max(SMALLEST_TILE, edge // 2)) for edge in tiling.size)
    if (height, width) != tiling.size and cuts((height, width)):
        stride = (-(-height // 2), -(-width // 2))
        rungs.append(Rung(tile_size=(height, width), tile_stride=stride, has_sums_on_host=True))
    if device.type != "cpu":
        rungs.append(Rung(is_on_cpu=True))
    return rungs


def step_down(work: str, rung: Rung, next_rung: Rung | None, error: RuntimeError, num_given: int = 0) -> None:
    """Say which rung comes next and why, or that there is none; errors that are not of memory pass."""
    if not is_out_of_memory(error):
        raise error
    reason = str(error).partition(". ")[0]
    if next_rung is None:
        advice = (
            "tiled=False asked for nothing else: leave it out, and tiles are used where the whole picture "
            "does not fit, or give tiled=True (--tiled)"
            if rung == Rung()
            else "Nothing smaller is left to try: free memory, or use another machine"
        )
        raise torch.OutOfMemoryError(f"Memory ran out while {work} {rung} ({reason}). {advice}.") from error
    seam = f" from frame {num_given} on, where a seam may show" if num_given else ""
    logger.warning(
        "Memory ran out while %s %s (%s); %s %s instead%s.", work, rung, reason, work, next_rung, seam
    )


def make_room() -> None:
    """Give memory back, when the exception, and with it every tensor of the failed attempt, is gone."""
    torch.cuda.empty_cache()


@contextmanager
def on_cpu(vae: object) -> Iterator[None]:
    """Let the VAE's tensors stand for copies on the CPU; what they stood for comes back at the end."""
    tensors = [*vae.parameters(), *vae.buffers()] if isinstance(vae, nn.Module) else []
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to("cpu")
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data

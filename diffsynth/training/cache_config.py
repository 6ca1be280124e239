"""How clips are encoded ahead of training: said by the user, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffsynth.errors import ArgumentError

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """What data_process does. One file per clip, beside its media unless ``cache_dir`` is given."""

    cache_dir: str | None = None  # folder of the cached samples; None: beside each media file
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of latents on the disk; text keeps its encoder's
    workers: int = 4  # threads that decode
    writers: int = 2  # threads that write
    block_clips: int = 512  # clips for which each encoder comes to the device once; their texts are in RAM
    tiled: bool = False  # code the VAE in tiles: less memory, slightly other numbers
    tile_size: tuple[int, int] = (34, 34)  # height and width in latent positions
    tile_stride: tuple[int, int] = (18, 16)  # from one tile to the next
    remove_stale: bool = False  # remove older samples of the same files: other captions, sizes or encoders
    strict: bool = False  # a clip that cannot be encoded is an error; otherwise it is listed and left out

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArgumentError(f"dtype is {self.dtype!r}; known: {', '.join(DTYPES)}.")
        for name, value in (
            ("workers", self.workers), ("writers", self.writers), ("block_clips", self.block_clips),
        ):  # fmt: skip
            if value < 1:
                raise ArgumentError(f"{name} is {value}; give 1 or more.")
        if any(not 1 <= step <= size for step, size in zip(self.tile_stride, self.tile_size, strict=True)):
            raise ArgumentError(
                f"tile_stride is {self.tile_stride} and tile_size {self.tile_size}; give "
                "strides from 1 up to the size."
            )

"""Latents into pictures: as a whole where that fits, else in tiles, else on the CPU.

Letters: B batch, C latent channels, T latent frames, h w latent height and width; f frames of one chunk,
H W pixels. Pictures leave the VAE chunk by chunk, a chunk being the frames of one latent frame, so that
memory does not grow with the length of a video. Tiles are the exception. To go through all tiles of a chunk
before the next chunk, every tile would keep a history, what the causal VAE remembers between chunks: half a
GB in bfloat16 for 30 x 52 positions, times 9 tiles at 480P, which is more than the untiled decode keeps. So
each tile is decoded through all its frames before the next one, and the sums of all frames are kept: 12 bytes
per pixel and frame (0.4 GB at 480P and 81 frames).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError, MissingModelError
from diffsynth.ops.convolution import warn_of_slow_convolutions
from diffsynth.ops.tiling import Tile, blend_mask, tile_starts
from diffsynth.pipelines.rungs import Rung, Tiling, ladder, make_room, on_cpu, step_down
from diffsynth.video import tensor_to_frames, to_pil

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from diffsynth.pipelines.components import PipelineComponents

    Videos = list[Image] | list[list[Image]] | Tensor | NDArray[np.float32]

logger = logging.getLogger("diffsynth")

OutputType = Literal["pil", "pt", "np"]
Rounding = Literal["round", "truncate"]
T = TypeVar("T")

# Chunks after which a decode needs no more memory: the first is one frame, the second finds half a history.
SETTLED_CHUNKS = 3


class VideoVAE(Protocol):
    """What a decode asks of a VAE."""

    spatial_stride: int
    temporal_stride: int

    @property
    def z_dim(self) -> int: ...

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class VideoDecoder:
    """The VAE of a pipeline and how pictures leave it."""

    vae: VideoVAE
    device: torch.device  # where the VAE computes
    tiling: Tiling
    rounding: Rounding = "round"
    tiled_by_plan: bool = False  # see `ladder`

    @classmethod
    def of(
        cls,
        parts: PipelineComponents,
        precision: str,
        tiling: Tiling,
        latents: Tensor,
        *,
        tiled_by_plan: bool = False,
    ) -> VideoDecoder:
        """The decoder of a pipeline, for these latents.

        Raises:
            MissingModelError: without a VAE.
            ArgumentError: for latents that it does not decode.
        """
        if parts.vae is None:
            raise MissingModelError(f"No VAE is loaded; load {parts.facts.vae_file} to decode latents.")
        decoder = cls(
            vae=parts.vae,
            device=parts.device,
            tiling=replace(tiling, tiled=tiling.starts_tiled(precision)),
            rounding="truncate" if precision == "v1" else "round",
            tiled_by_plan=tiled_by_plan,
        )
        decoder.check(latents)
        return decoder

    def check(self, latents: Tensor) -> None:
        """Raise ArgumentError unless this VAE decodes such latents."""
        shape, channels = tuple(latents.shape), self.vae.z_dim
        if len(shape) != 5 or shape[1] != channels or 0 in shape or not latents.is_floating_point():
            raise ArgumentError(
                f"latents are {latents.dtype} of shape {shape}; this VAE decodes real numbers of shape "
                f"(B, {channels}, T, h, w). Load the VAE of the model that made them."
            )

    @torch.no_grad()
    def frames(self, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames (H, W, 3) of one video (1, C, T, h, w), each once, as they are ready.

        When memory runs out the video is decoded again from its start on the next rung. Frames are given
        away from the third chunk on, when memory no longer grows, so that nearly always all are of one
        rung; frames that were given away are not given again.

        Raises:
            torch.OutOfMemoryError: when the last rung does not fit either; says what to do.
            NotFiniteError: when the pictures hold NaN.
        """
        num_given = 0
        rungs = self._ladder(latents)
        for rung, next_rung in zip(rungs, [*rungs[1:], None], strict=True):
            try:
                for frame in islice(_settled(self._pictures(latents, rung)), num_given, None):
                    num_given += 1
                    yield frame
                return
            except RuntimeError as error:
                step_down("decoding", rung, next_rung, error, num_given)
            make_room()

    @torch.no_grad()
    def videos(self, latents: Tensor, output_type: OutputType, *, is_batch: bool) -> Videos:
        """Decode (B, C, T, h, w) to what `pipe()` returns; every video is made on one rung.

        Raises:
            torch.OutOfMemoryError, NotFiniteError: as `frames`.
        """
        rows = torch.split(latents, 1)
        if output_type == "pil":
            videos = [
                [frame for chunk in self._complete(row, self._to_pil) for frame in chunk] for row in rows
            ]
            return videos if is_batch else videos[0]
        stacked = torch.cat([torch.cat(self._complete(row, _to_unit_range), dim=1) for row in rows])
        return stacked if output_type == "pt" else stacked.movedim(2, -1).numpy()

    def _complete(self, latents: Tensor, convert: Callable[[Tensor], T]) -> list[T]:
        rungs = self._ladder(latents)
        for rung, next_rung in zip(rungs, [*rungs[1:], None], strict=True):
            try:
                return [convert(chunk) for chunk in decoded_chunks(self.vae, latents, rung)]
            except RuntimeError as error:
                step_down("decoding", rung, next_rung, error)
            make_room()
        raise AssertionError("the last rung returns or raises")

    def _ladder(self, latents: Tensor) -> list[Rung]:
        warn_of_slow_convolutions(self.vae, self.device)
        size = (latents.shape[3], latents.shape[4])
        return ladder(self.tiling, size, self.device, tiled_by_plan=self.tiled_by_plan)

    def _pictures(self, latents: Tensor, rung: Rung) -> Iterator[NDArray[np.uint8]]:
        """(f, H, W, 3) uint8 on the host, chunk by chunk."""
        for chunk in decoded_chunks(self.vae, latents, rung):
            yield tensor_to_frames(chunk, self.rounding)[0]

    def _to_pil(self, chunk: Tensor) -> list[Image]:
        return to_pil(tensor_to_frames(chunk, self.rounding)[0])


def decoded_chunks(vae: VideoVAE, latents: Tensor, rung: Rung) -> Iterator[Tensor]:
    """Yield one video (1, C, T, h, w) in chunks (1, 3, f, H, W), float32 in [-1, 1], to be used up at once.

    In tiles nothing is yielded before the last tile is decoded; see the module for what that keeps.
    """
    with on_cpu(vae) if rung.is_on_cpu else nullcontext():
        latents = latents.cpu() if rung.is_on_cpu else latents
        if rung.tile_size is not None:
            yield from _tiled_chunks(vae, latents, rung, rung.tile_size)
        else:
            for chunk in vae.decode_stream(latents):
                yield chunk.clamp_(-1, 1)


def _tiled_chunks(vae: VideoVAE, latents: Tensor, rung: Rung, tile_size: tuple[int, int]) -> Iterator[Tensor]:
    scale, (num_latents, height, width) = vae.spatial_stride, latents.shape[2:]
    shape = (1, 3, (num_latents - 1) * vae.temporal_stride + 1, height * scale, width * scale)
    total = weight = None
    for tile in _tiles(height, width, tile_size, rung.tile_stride):
        rows, columns = tile.region(scale)
        start = 0
        for decoded in vae.decode_stream(tile.cut(latents)):
            chunk = decoded.cpu() if rung.has_sums_on_host else decoded
            if total is None:
                total, weight = chunk.new_zeros(shape), chunk.new_zeros(shape[3:])
            mask = blend_mask(tile, scale=scale, device=chunk.device)
            end = start + chunk.shape[2]
            total[:, :, start:end, rows, columns] += chunk * mask
            if start == 0 and weight is not None:
                weight[rows, columns] += mask
            start = end
    assert total is not None and weight is not None
    for chunk in torch.split(total, vae.temporal_stride, dim=2):
        yield chunk.div_(weight).clamp_(-1, 1)


def _tiles(height: int, width: int, size: tuple[int, int], stride: tuple[int, int]) -> list[Tile]:
    rows, columns = (tile_starts(height, size[0], stride[0]), tile_starts(width, size[1], stride[1]))
    border = (size[0] - stride[0], size[1] - stride[1])
    return [
        Tile(top=row, left=column, height=min(size[0], height - row), width=min(size[1], width - column),
             border=border, picture=(height, width))
        for row in rows for column in columns
    ]  # fmt: skip


def _settled(chunks: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Single frames; those of the first chunks when memory no longer grows."""
    held: list[NDArray[np.uint8]] = []
    for index, chunk in enumerate(chunks):
        held.append(chunk)
        if index + 1 >= SETTLED_CHUNKS:
            for ready in held:
                yield from ready
            held.clear()
    for ready in held:
        yield from ready


def _to_unit_range(chunk: Tensor) -> Tensor:
    """(1, 3, f, H, W) in [-1, 1] -> (1, f, 3, H, W) in [0, 1] on the host."""
    return chunk.add_(1).div_(2).transpose(1, 2).cpu()

"""Videos into latents, in the way that fits; frames go to the device a few at a time.

Letters: B batch, C latent channels, F pixel frames, T latent frames, H W pixels, h w latent positions.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.ops.convolution import warn_of_slow_convolutions
from diffsynth.pipelines.rungs import Rung, Tiling, ladder, make_room, on_cpu, step_down
from diffsynth.video.lazy_video import LazyVideo


class EncodingVAE(Protocol):
    """What an encode asks of a VAE."""

    spatial_stride: int

    def encode(
        self,
        video: Tensor | LazyVideo,
        *,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class VideoEncoder:
    """The VAE of a pipeline and how it codes."""

    vae: EncodingVAE
    device: torch.device  # where the VAE computes
    tiling: Tiling
    tiled_by_plan: bool = False  # see `ladder`

    @torch.no_grad()
    def latents(self, video: Tensor | LazyVideo) -> Tensor:
        """Return the mean of the latent, (B, C, T, h, w) float32 on the device.

        Args:
            video: (B, 3, F, H, W), anywhere: real numbers in [-1, 1], or bytes.

        Raises:
            torch.OutOfMemoryError: when the last rung does not fit either; says what to do.
        """
        warn_of_slow_convolutions(self.vae, self.device)
        stride = self.vae.spatial_stride
        size = (video.shape[3] // stride, video.shape[4] // stride)
        rungs = ladder(self.tiling, size, self.device, tiled_by_plan=self.tiled_by_plan)
        for rung, next_rung in zip(rungs, [*rungs[1:], None], strict=True):
            try:
                return self._encoded(video, rung).to(self.device)
            except RuntimeError as error:
                step_down("encoding", rung, next_rung, error)
            make_room()
        raise AssertionError("the last rung returns or raises")

    def _encoded(self, video: Tensor | LazyVideo, rung: Rung) -> Tensor:
        stride = None if rung.tile_size is None else rung.tile_stride
        with on_cpu(self.vae) if rung.is_on_cpu else nullcontext():
            return self.vae.encode(video, tile_size=rung.tile_size, tile_stride=stride)

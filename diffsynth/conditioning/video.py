"""Video to video: the clean latent of an input video, over which noise is laid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.clips import about
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution, LatentPlan
from diffsynth.errors import ArgumentError, MissingModelError
from diffsynth.video import frames_to_tensor

if TYPE_CHECKING:
    from diffsynth.video import Frame

logger = logging.getLogger("diffsynth")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInputs:
    """A video to start from."""

    input_video: Sequence[Frame] | None = None  # frames, a VideoData, or floats in [0, 1] (F, 3, H, W)
    sigmas: object = None  # noise levels of the caller, which may begin below the top
    denoising_strength: float = 1.0  # share of noise laid over it: 0.7 keeps the layout, 1 ignores the video
    tile_size: tuple[int, int] | None = None
    tile_stride: tuple[int, int] | None = None


class VideoConditioner:
    """Encodes the input video; the sampler's first noise level lays noise over it."""

    Inputs: ClassVar[type] = VideoInputs
    encoder: ClassVar[str | None] = "vae"

    def applies(self, inputs: VideoInputs, parts: Components) -> bool:
        if inputs.input_video is None:
            if inputs.denoising_strength != 1.0:
                raise ArgumentError(
                    f"denoising_strength is {inputs.denoising_strength} but there is no input_video to keep; "
                    "give input_video=, or leave denoising_strength at 1."
                )
            return False
        if inputs.denoising_strength == 1.0 and inputs.sigmas is None:
            logger.warning(
                "denoising_strength is 1: nothing of input_video is kept; 0.7 keeps its layout, 0.3 its look."
            )
        if parts.vae is None:
            raise MissingModelError(f"input_video needs the VAE; load it ({parts.vae_file}).")
        return True

    def needs_encoder(self, inputs: VideoInputs, parts: Components) -> bool:
        return True

    def check(self, inputs: VideoInputs, geometry: Geometry, parts: Components) -> None:
        assert inputs.input_video is not None
        if isinstance(inputs.input_video, str):
            path = repr(inputs.input_video)
            raise ArgumentError(f"input_video is {path}; open a file first: VideoData({path}).")
        length = len(inputs.input_video)
        if not length:
            raise ArgumentError(f"input_video is empty; give {geometry.num_frames} frames or more.")
        if length < geometry.num_frames:
            raise ArgumentError(
                f"input_video has {length} frames and num_frames is {geometry.num_frames}; "
                f"give num_frames={(length - 1) // 4 * 4 + 1}, or a longer video."
            )

    def encode(self, inputs: VideoInputs, geometry: Geometry, parts: Components) -> Contribution:
        import torch

        assert parts.vae is not None and inputs.input_video is not None
        frames = inputs.input_video[: geometry.num_frames]
        with about("input_video"):
            video = frames_to_tensor(frames, geometry.height, geometry.width)
        with torch.no_grad():
            start = parts.vae.encode(
                video.to(parts.device), tile_size=inputs.tile_size, tile_stride=inputs.tile_stride
            )
        return Contribution(latents=LatentPlan(start=start.expand(geometry.num_videos, -1, -1, -1, -1)))

"""Video to video: the clean latent of an input video, over which noise is laid."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.argument import SOURCE, argument, names_read
from diffsynth.conditioning.clips import Fit, check_length, lazy_clip
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution, LatentPlan
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
    from diffsynth.video.pixels import Frames

logger = logging.getLogger("diffsynth")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInputs:
    """A video to start from."""

    # Frames, a VideoData, or floats in [0, 1] (F, 3, H, W). No column of a dataset: a clip is its own.
    input_video: Frames | None = argument(
        None, help="A video, or a folder of pictures.", kind="video", group=SOURCE,
        flags=("--input-video", "--init_video"), refined="decided",
    )  # fmt: skip
    fit: Fit | None = None  # "hold" repeats the last frame of a shorter video; a longer one is trimmed
    sigmas: object = None  # noise levels of the caller, which may begin below the top
    denoising_strength: float = argument(
        1.0, help="Share of noise laid over `input_video`: 0.7 keeps the layout, 1 ignores it.",
        kind="number", group=SOURCE, flags=("--denoising-strength", "--denoising_strength"),
        refined="anew",
    )  # fmt: skip
    tile_size: tuple[int, int] | None = None
    tile_stride: tuple[int, int] | None = None


class VideoConditioner:
    """Encodes the input video; the sampler's first noise level lays noise over it."""

    Inputs: ClassVar[type] = VideoInputs
    encoder: ClassVar[str | None] = "vae"

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset(names_read([VideoInputs]))

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset()

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
        return True

    def needs_encoder(self, inputs: VideoInputs, parts: Components) -> bool:
        return True

    def check(self, inputs: VideoInputs, geometry: Geometry, parts: Components) -> None:
        assert inputs.input_video is not None
        check_length(inputs.input_video, geometry, name="input_video", fit=self._fit(inputs))

    def encode(self, inputs: VideoInputs, geometry: Geometry, parts: Components) -> Contribution:
        import torch

        assert parts.vae is not None and inputs.input_video is not None
        video = lazy_clip(inputs.input_video, geometry, name="input_video", fit=self._fit(inputs))
        with torch.no_grad():
            start = parts.encode_video(video, tile_size=inputs.tile_size, tile_stride=inputs.tile_stride)
        return Contribution(latents=LatentPlan(start=start.expand(geometry.num_videos, -1, -1, -1, -1)))

    @staticmethod
    def _fit(inputs: VideoInputs) -> Fit:
        """A longer video is read from its start, as in v1, unless the caller says another thing."""
        return inputs.fit or "trim"

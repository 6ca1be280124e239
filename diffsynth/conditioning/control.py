"""Fun Control: a video of edges, poses or depth that the generated one follows, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.argument import SOURCE, argument
from diffsynth.conditioning.clips import Fit, check_length, lazy_clip
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError, UnusedInputError

if TYPE_CHECKING:
    from diffsynth.video.pixels import Frames


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlInputs:
    """A video to follow."""

    # frames, a VideoData, or floats in [0, 1] (F, 3, H, W)
    control_video: Frames | None = argument(
        None,
        help="Edges, poses or depth to follow, of a Fun Control model: a video, or a folder of pictures.",
        kind="video", scope="clip", group=SOURCE,
        unread="no loaded model reads it: it needs a Fun-Control model",
    )  # fmt: skip
    # of control_video, vace_video and input_video
    fit: Fit | None = argument(
        None,
        help="Of a video that is not `num_frames` long: trim a longer, hold a shorter one's last frame.",
        kind="text", group=SOURCE, choices=("trim", "hold"),
    )  # fmt: skip
    vace_video: Frames | None = None  # read elsewhere; here to know whether anything reads ``fit``
    vace_video_mask: Frames | None = None
    input_video: Frames | None = None
    tile_size: tuple[int, int] | None = None
    tile_stride: tuple[int, int] | None = None


class ControlConditioner:
    """The latent of a control video, in the plane "control".

    Source: wan_numerics 10.1 and 10.3; DiffSynth-Studio v1 ``pipelines/wan_video.py``.
    """

    Inputs: ClassVar[type] = ControlInputs
    encoder: ClassVar[str | None] = "vae"

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        own = {"control_video", "fit", "tile_size", "tile_stride"}
        return frozenset(own if "control" in facts.planes else ())

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset({"control_video"} if "control" in facts.planes else ())

    def applies(self, inputs: ControlInputs, parts: Components) -> bool:
        videos = (inputs.control_video, inputs.vace_video, inputs.vace_video_mask, inputs.input_video)
        if inputs.fit is not None and all(video is None for video in videos):
            raise UnusedInputError("fit was given, but no video that it could fit; leave it out.")
        if inputs.control_video is None:
            if self.needs(parts.facts):
                raise ArgumentError(
                    "This model follows a control video and none was given; give control_video=, as many "
                    "frames as num_frames."
                )
            return False
        return True

    def needs_encoder(self, inputs: ControlInputs, parts: Components) -> bool:
        return True

    def check(self, inputs: ControlInputs, geometry: Geometry, parts: Components) -> None:
        assert inputs.control_video is not None
        check_length(inputs.control_video, geometry, name="control_video", fit=inputs.fit)

    def encode(self, inputs: ControlInputs, geometry: Geometry, parts: Components) -> Contribution:
        import torch

        assert parts.vae is not None and inputs.control_video is not None
        video = lazy_clip(inputs.control_video, geometry, name="control_video", fit=inputs.fit)
        with torch.no_grad():
            plane = parts.encode_video(video, tile_size=inputs.tile_size, tile_stride=inputs.tile_stride)
        return Contribution(planes={"control": (plane.expand(geometry.num_videos, -1, -1, -1, -1), None)})

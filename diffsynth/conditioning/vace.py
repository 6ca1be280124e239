"""VACE: a video with holes, a mask of the holes and reference pictures, as one context for its blocks.

Letters: B batch, F pixel frames, H W pixel height and width, R references, T latent frames, h w latent height
and width, z latent channels, s pixels along an edge of a latent position.
Mask: 1 (white) is made anew, 0 (black) is kept. Source: Wan2.1 ``wan/vace.py``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar

from diffsynth.conditioning.argument import SOURCE, argument
from diffsynth.conditioning.clips import Fit, about, check_length, check_picture, lazy_clip
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution, LatentPlan
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError, UnusedInputError

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.sampling.step import Step
    from diffsynth.video import Frame
    from diffsynth.video.lazy_video import LazyVideo
    from diffsynth.video.pixels import Frames

logger = logging.getLogger("diffsynth")

MODELS = "Wan2.1-VACE-1.3B, Wan2.1-VACE-14B, or a VACE module beside a text-to-video DiT"
UNREAD = f"no loaded model reads it; it needs {MODELS}"
USUAL_SCALE, MAX_SCALE = 2.0, 10.0  # of the range that is documented; beyond it pictures break


@dataclass(frozen=True, kw_only=True)
class VaceCondition:
    """What the VACE blocks read."""

    context: Tensor  # (B or 1, 2 z + s s, R + T, h, w): kept part, part to make anew, mask
    scales: tuple[float, ...] = (1.0,)  # how strongly hints count: one number, or one per step

    def scale_at(self, step: Step | None) -> float:
        """How strongly hints count at a step.

        Raises:
            ArgumentError: for one scale per step where there are no steps, as in training, or others.
        """
        if len(self.scales) == 1:
            return self.scales[0]
        if step is None or step.count != len(self.scales):
            told = "no steps" if step is None else f"{step.count} steps"
            raise ArgumentError(
                f"vace_scale has {len(self.scales)} numbers, one per step, and there are {told}; give one "
                "number for all."
            )
        return self.scales[step.index]

    def front(self, num_frames: int, num_channels: int) -> Tensor:
        """Clean latents of the pictures in front, (B or 1, num_channels, num_frames, h, w)."""
        return self.context[:, :num_channels, :num_frames]


@dataclass(frozen=True, kw_only=True, slots=True)
class VaceInputs:
    """What VACE is shown."""

    vace_video: Frames | None = argument(
        None,
        help="What is known, of a VACE model, grey where something shall be made: a video, or a folder.",
        kind="video", scope="clip", group=SOURCE, official=("src_video",), unread=UNREAD,
    )  # fmt: skip
    vace_video_mask: Frames | None = argument(
        None, help="Of `vace_video`: white is made anew, black is kept; a video, or a folder of pictures.",
        kind="video", scope="clip", group=SOURCE, official=("src_mask",), unread=UNREAD,
    )  # fmt: skip
    vace_reference_image: Frame | Sequence[Frame] | None = argument(
        None, help="What or who shall appear, of a VACE model; several times for several pictures.",
        kind="pictures", scope="clip", group=SOURCE, official=("src_ref_images",), unread=UNREAD,
    )  # fmt: skip
    vace_scale: float | Sequence[float] = argument(  # or one number per step
        1.0, help="How strongly the VACE inputs count: 0 to 2; 1 is usual.", kind="numbers", scope="clip",
        group=SOURCE,
    )  # fmt: skip
    fit: Fit | None = None  # "trim" | "hold": for a video or mask of another length than num_frames
    tile_size: tuple[int, int] | None = None
    tile_stride: tuple[int, int] | None = None
    input_video: object = None  # read elsewhere; it has no frames for the places of references

    @property
    def references(self) -> list[Frame]:
        """Reference pictures, in the order in which they are given."""
        given: Any = self.vace_reference_image
        if given is None:
            return []
        is_one = isinstance(given, str) or hasattr(given, "getbands") or getattr(given, "ndim", 0) in (2, 3)
        return [given] if is_one else list(given)

    @property
    def extra_frames(self) -> int:
        """Latent frames that stand in front of the video's: one per reference."""
        return len(self.references)

    @property
    def given(self) -> list[str]:
        """Names of the inputs that are there."""
        names = ("vace_video", "vace_video_mask", "vace_reference_image")
        return [name for name in names if getattr(self, name) is not None]


class VaceConditioner:
    """Splits the video by its mask, encodes both parts and each reference, and lays the mask beside them."""

    Inputs: ClassVar[type] = VaceInputs
    encoder: ClassVar[str | None] = "vae"

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        own = ("vace_video", "vace_video_mask", "vace_reference_image", "vace_scale")
        shared = ("fit", "tile_size", "tile_stride")
        return frozenset((*own, *shared) if "vace" in facts.adapters else ())

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset()

    def applies(self, inputs: VaceInputs, parts: Components) -> bool:
        scales = _scales(inputs)
        if not inputs.given:
            if scales != (1.0,):
                raise UnusedInputError(
                    "vace_scale was given, but there is nothing to scale: give a VACE model vace_video= or "
                    "vace_reference_image=, or leave vace_scale out."
                )
            return False
        if inputs.vace_video is None and inputs.vace_video_mask is not None:
            raise ArgumentError(
                "vace_video_mask was given without vace_video; give the video that it is a mask of (grey "
                "where nothing is known), or leave it out."
            )
        if inputs.vace_reference_image is not None and not inputs.references:
            raise ArgumentError("vace_reference_image is empty; give one picture or more, or leave it out.")
        if inputs.references and inputs.input_video is not None:
            raise ArgumentError(
                "vace_reference_image and input_video are both given: references stand in front of the "
                "latents, where input_video has nothing to start from. Give vace_video= in place of "
                "input_video=, or leave the references out."
            )
        if max(scales) > USUAL_SCALE:
            logger.warning(
                "vace_scale is %g; 0 (no effect) to %g are usual, above it pictures come apart.",
                max(scales), USUAL_SCALE,
            )  # fmt: skip
        return True

    def needs_encoder(self, inputs: VaceInputs, parts: Components) -> bool:
        return True

    def check(self, inputs: VaceInputs, geometry: Geometry, parts: Components) -> None:
        scales = _scales(inputs)
        if len(scales) not in (1, geometry.num_steps):
            raise ArgumentError(
                f"vace_scale has {len(scales)} numbers and there are {geometry.num_steps} steps; give one "
                "number per step, or one for all."
            )
        for name in ("vace_video", "vace_video_mask"):
            if (frames := getattr(inputs, name)) is not None:
                check_length(frames, geometry, name=name, fit=inputs.fit)
        for picture in inputs.references:
            check_picture(picture, "vace_reference_image")
        _check_shapes(inputs)

    def encode(self, inputs: VaceInputs, geometry: Geometry, parts: Components) -> Contribution:
        condition = VaceCondition(context=self._context(inputs, geometry, parts), scales=_scales(inputs))
        return Contribution(
            adapters={"vace": (condition, None)}, latents=LatentPlan(extra_frames=inputs.extra_frames)
        )

    def _context(self, inputs: VaceInputs, geometry: Geometry, parts: Components) -> Tensor:
        """(1, 2 z + s s, R + T, h, w)."""
        import torch

        def encoded(video: Tensor | LazyVideo) -> Tensor:
            assert parts.vae is not None
            with torch.no_grad():
                return parts.encode_video(video, tile_size=inputs.tile_size, tile_stride=inputs.tile_stride)

        mask = _mask(inputs, geometry)
        if inputs.vace_video is None:
            size = (geometry.num_frames, geometry.height, geometry.width)
            kept = made = encoded(torch.zeros(1, 3, 1, 1, 1).expand(1, 3, *size))
        else:
            video = lazy_clip(inputs.vace_video, geometry, name="vace_video", fit=inputs.fit)
            kept, made = (encoded(_part_of(video, mask, is_made=is_made)) for is_made in (False, True))
        stride = geometry.height // geometry.latent_height
        shown = set(frames_shown(geometry.num_frames, kept.shape[2]))
        channels = [
            mask_channels(frame, stride).to(kept) for i, frame in enumerate(mask.read()) if i in shown
        ]
        context = torch.cat([kept, made, torch.cat(channels, dim=2)], dim=1)
        fronts = []
        for picture in inputs.references:
            canvas = reference_canvas(picture, geometry.height, geometry.width)
            latent = encoded(canvas[None, :, None])
            rest = latent.new_zeros(1, context.shape[1] - latent.shape[1], *latent.shape[2:])
            fronts.append(torch.cat([latent, rest], dim=1))
        return torch.cat([*fronts, context], dim=2)


def frames_shown(num_frames: int, num_latents: int) -> list[int]:
    """The frame of the mask that stands for each latent frame, as "nearest-exact" picks it."""
    return [(2 * latent + 1) * num_frames // (2 * num_latents) for latent in range(num_latents)]


def mask_channels(mask: Tensor, stride: int) -> Tensor:
    """Lay the pixels of a mask into channels.

    Args:
        mask: (1, 1, F, H, W) in [0, 1].
        stride: s.

    Returns:
        (1, s s, F, H / s, W / s): channel s row + column holds that pixel of each s x s square.
    """
    height, width = mask.shape[3] // stride, mask.shape[4] // stride
    squares = mask[:, 0].reshape(*mask.shape[:1], mask.shape[2], height, stride, width, stride)
    return squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)


def reference_canvas(picture: Frame, height: int, width: int) -> Tensor:
    """Return a reference picture, fitted into the video's size on white.

    Args:
        picture: PIL, uint8 (H, W, 3), or real (3, H, W) in [0, 1].
        height: of the video, in pixels.
        width: of the video.

    Returns:
        (3, height, width) float32 in [-1, 1]. A picture of this size is left as it is.

    Source: Wan2.1 ``wan/vace.py`` prepare_source: bilinear without antialias, sizes cut to whole pixels.
    """
    import torch
    import torch.nn.functional as F

    from diffsynth.video import frames_to_tensor, picture_size

    own = picture_size(picture)
    with about("vace_reference_image", is_picture=True):
        pixels = frames_to_tensor([picture], *own)[0, :, 0]
    if own == (height, width):
        return pixels
    scale = min(height / own[0], width / own[1])
    rows, columns = max(1, int(own[0] * scale)), max(1, int(own[1] * scale))
    fitted = F.interpolate(pixels[None], size=(rows, columns), mode="bilinear", align_corners=False)[0]
    canvas = torch.ones(3, height, width, dtype=pixels.dtype, device=pixels.device)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas[:, top : top + rows, left : left + columns] = fitted
    return canvas


def _check_shapes(inputs: VaceInputs) -> None:
    """A mask of other proportions would be cropped in another way than its video."""
    from diffsynth.video import picture_size
    from diffsynth.video.pixels import iterate_frames

    sizes = []
    for name in ("vace_video", "vace_video_mask"):
        frames = getattr(inputs, name)
        if frames is None or isinstance(frames, Iterator):
            return
        with about(name):
            sizes.append(picture_size(next(iter(iterate_frames(frames)))))
    (height, width), (mask_height, mask_width) = sizes
    if abs(height * mask_width / width - mask_height) >= 1:
        raise ArgumentError(
            f"vace_video_mask is {mask_width}x{mask_height} and vace_video {width}x{height}; give a mask of "
            "the video's proportions."
        )


def _mask(inputs: VaceInputs, geometry: Geometry) -> LazyVideo:
    """(1, 1, F, H, W) in [0, 1]; without a mask all is made anew."""
    import torch

    from diffsynth.video.lazy_video import LazyVideo

    shape = (1, 1, geometry.num_frames, geometry.height, geometry.width)
    if inputs.vace_video_mask is None:
        return LazyVideo(shape, lambda: repeat(torch.ones(1, 1, 1, *shape[3:]), shape[2]))
    pixels = lazy_clip(inputs.vace_video_mask, geometry, name="vace_video_mask", fit=inputs.fit)
    return LazyVideo(shape, lambda: (((frame[:, :1] + 1) / 2).clamp(0.0, 1.0) for frame in pixels.read()))


def _part_of(video: LazyVideo, mask: LazyVideo, *, is_made: bool) -> LazyVideo:
    """What of the video is made anew, or what is kept, and grey elsewhere.

    The split is hard, whatever greys the mask has; its channels keep them.
    """
    from diffsynth.video.lazy_video import LazyVideo

    def read() -> Iterator[Tensor]:
        for frame, greys in zip(video.read(), mask.read(), strict=True):
            share = (greys > 0.5).to(frame)
            yield frame * (share if is_made else 1 - share)

    return LazyVideo(video.shape, read)


def _scales(inputs: VaceInputs) -> tuple[float, ...]:
    given: Any = inputs.vace_scale
    if isinstance(given, (int, float)):
        scales: tuple[Any, ...] = (given,)
    else:
        scales = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not scales or not all(
        isinstance(s, (int, float)) and math.isfinite(s) and 0.0 <= s <= MAX_SCALE for s in scales
    ):
        raise ArgumentError(
            f"vace_scale is {given!r}; give a number from 0 (no effect) to {USUAL_SCALE:g}, 1 is usual, or a "
            f"list of one such number per step; above {MAX_SCALE:g} nothing can be seen."
        )
    return tuple(float(s) for s in scales)

"""Pictures that the video begins and ends with: planes or frames held clean, and tokens of the image encoder.

Letters: B batch, F pixel frames, T latent frames, H W pixels, h w latent positions, C latent channels.
Two conditioners share one `ImageInputs`, because two encoders read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, repeat
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.argument import SOURCE, argument
from diffsynth.conditioning.clips import about, check_picture
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution, LatentPlan
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError, UnusedInputError

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.video import Frame, Resize
    from diffsynth.video.lazy_video import LazyVideo

FRAMES_OF_A_LATENT = 4  # pixel frames, except of the first latent, which is one frame
IMAGE_TOKENS = 257  # of one picture, by the released encoder
# what the log adds where a picture of other proportions is cropped
ADVICE = "; resize='contain' or 'stretch' keeps all of it"
ADVICE_SIZE = f"{ADVICE}, and max_area= its proportions"
UNREAD = (
    "the loaded model reads no picture; I2V-14B, FLF2V-14B, Fun InP, Fun Control, Wan2.2 I2V-A14B, TI2V-5B "
    "and Fun-5B take it. To begin with a picture on a VACE model, give it as the first frame of vace_video"
)
END_UNREAD = (
    "the loaded model has no plane that says which frames are given; FLF2V-14B, Fun InP and Wan2.2 I2V-A14B "
    "take it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInputs:
    """Pictures to begin and to end with."""

    # PIL, uint8 (H, W, 3), or floats in [0, 1] (3, H, W)
    input_image: Frame | None = argument(
        None, help="The first frame, of an image-to-video model.", kind="picture", scope="clip",
        group=SOURCE, official=("image", "first_frame"), unread=UNREAD,
    )  # fmt: skip
    end_image: Frame | None = argument(
        None, help="The last frame, of an FLF2V or InP model.", kind="picture", scope="clip",
        group=SOURCE, official=("last_frame",), unread=END_UNREAD,
    )  # fmt: skip
    reference_image: Frame | None = None  # of Fun Control: the image encoder looks at it, not at input_image
    # of a picture of another size: "cover" crops in the middle, "stretch" gives up the proportions, as v1 did
    resize: Resize = argument(
        "cover", help="How pictures are brought to size: cover crops, stretch distorts, contain sets bars.",
        kind="text", group=SOURCE, choices=("cover", "stretch", "contain"),
    )  # fmt: skip
    # about this area; the picture is then resized as officially
    max_area: int | None = argument(
        None, help="Pixels: height and width follow `input_image`'s proportions; 480 * 832 = 399360.",
        kind="whole", unit="pixels", group=SOURCE, refined="decided",
    )  # fmt: skip
    tile_size: tuple[int, int] | None = None
    tile_stride: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        pictures = (self.input_image, self.end_image, self.reference_image)
        if self.resize != "cover" and all(picture is None for picture in pictures):
            raise UnusedInputError(
                f"resize is {self.resize!r}, but there is no input_image that it could fit; leave it out."
            )
        if self.max_area is not None and self.resize != "cover":
            raise UnusedInputError(
                f"max_area= keeps the picture's proportions, so that resize={self.resize!r} is not read; "
                "leave one of them out."
            )


def size_within(size: tuple[int, int], max_area: int, multiples: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a video with a picture's proportions.

    Args:
        size: height and width of the picture.
        max_area: pixels that the video has at most; what the official ``--size`` means for pictures.
        multiples: what height and width are multiples of.

    Raises:
        ArgumentError: when no pixel is left.

    Source: Wan2.1 ``wan/image2video.py``. Rounded down as there, in float64: a picture that already has the
    area may lose a row of patches (480 x 832 becomes 464 x 832).
    """
    _check_area(max_area)
    aspect = size[0] / size[1]
    sides = (math.sqrt(max_area * aspect), math.sqrt(max_area / aspect))
    height, width = (
        int(side // multiple) * multiple for side, multiple in zip(sides, multiples, strict=True)
    )
    if not height or not width:
        raise _too_small(size, max_area, multiples)
    return height, width


def size_nearest(size: tuple[int, int], max_area: int, multiples: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a video with nearly a picture's proportions: TI2V's rule.

    The width is rounded down first and the height follows from the area, or the other way round, whichever
    comes nearer to the picture's proportions. Arguments and errors are those of `size_within`.

    Source: Wan2.2 ``wan/utils/utils.py`` best_output_size; of two equally near ones the second.
    """
    _check_area(max_area)
    ratio = size[1] / size[0]
    wide = math.sqrt(max_area * ratio)
    height_step, width_step = multiples
    found = []
    if width := int(wide // width_step) * width_step:
        found.append((int(max_area / width // height_step) * height_step, width))
    if height := int(max_area / wide // height_step) * height_step:
        found.append((height, int(max_area / height // width_step) * width_step))
    found = [(height, width) for height, width in reversed(found) if height and width]
    if not found:
        raise _too_small(size, max_area, multiples)
    return min(found, key=lambda sides: max(ratio * sides[0] / sides[1], sides[1] / sides[0] / ratio))


def _check_area(max_area: int) -> None:
    if not isinstance(max_area, Integral) or max_area < 1:
        raise ArgumentError(f"max_area is {max_area!r}; give a number of pixels, such as 480 * 832.")


def _too_small(size: tuple[int, int], max_area: int, multiples: tuple[int, int]) -> ArgumentError:
    return ArgumentError(
        f"max_area is {max_area}, too small for a picture of {size[1]}x{size[0]}: height and width are "
        f"multiples of {multiples[0]} and {multiples[1]}."
    )


def known_frames(geometry: Geometry, *, has_end: bool) -> Tensor:
    """Return the plane "mask": 1 where a pixel frame is given, 0 where it is to be made.

    Returns:
        (1, 4, T, h, w) float32: the four pixel frames of each latent one; the first frame counts four times.
    """
    import torch

    known = torch.zeros(geometry.num_frames)
    known[0] = 1.0
    if has_end:
        known[-1] = 1.0
    rows = torch.cat([known[:1].repeat(FRAMES_OF_A_LATENT), known[1:]]).view(-1, FRAMES_OF_A_LATENT)
    shape = (1, FRAMES_OF_A_LATENT, rows.shape[0], geometry.latent_height, geometry.latent_width)
    return rows.T[None, :, :, None, None].expand(shape)


def fitted(image: Frame, inputs: ImageInputs, geometry: Geometry, *, log: bool = True) -> Tensor:
    """Return a picture in the size of the video, (1, 3, 1, H, W) float32, in [-1, 1] or a little beyond."""
    from torch.nn.functional import interpolate

    from diffsynth.video import frames_to_tensor

    if inputs.max_area is None:
        with about(_name_of(image, inputs), is_picture=True):
            return frames_to_tensor(
                [image], geometry.height, geometry.width, inputs.resize, log=log,
                name=_name_of(image, inputs), advice=ADVICE_SIZE,
            )  # fmt: skip
    # As officially: bicubic without antialiasing, not clamped; the proportions differ by the rounding only.
    whole = _original(image, inputs, log=log)[:, :, 0].float()
    size = (geometry.height, geometry.width)
    return interpolate(whole, size=size, mode="bicubic", align_corners=False)[:, :, None]


def _original(image: Frame, inputs: ImageInputs, *, log: bool) -> Tensor:
    """A picture in its own size, (1, 3, 1, H, W), the last frame with the proportions of the first."""
    from diffsynth.video import frames_to_tensor, picture_size

    assert inputs.input_image is not None
    first, size = picture_size(inputs.input_image), picture_size(image)
    is_reference = image is inputs.reference_image
    with about(_name_of(image, inputs), is_picture=True):
        return frames_to_tensor([image], *(size if is_reference else first), log=log)


def _name_of(image: Frame, inputs: ImageInputs) -> str:
    names = ("input_image", "end_image", "reference_image")
    return next(name for name in names if getattr(inputs, name) is image)


class ImageConditioner:
    """First and last frame in the planes "mask" and "image", or the first frame as a latent held clean.

    With a plane "mask" the video of these frames and grey between them is coded; without it (Fun Control and
    Camera of Wan2.1) the picture alone, as the first of latent frames that are zero otherwise.
    TI2V has no planes: its first latent frame is that of the picture, and its clock stands at 0. Fun-5B,
    made of it, has both: planes, and the first latent frame of "image" held clean.
    Source: Wan2.1 ``wan/image2video.py``, ``wan/first_last_frame2video.py``; VideoX-Fun for Control and for
    Fun-5B (wan_numerics 10.2); Wan2.2 ``wan/textimage2video.py``.
    """

    Inputs: ClassVar[type] = ImageInputs
    encoder: ClassVar[str | None] = "vae"

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        if "image" not in facts.planes and not facts.holds_first_frame:
            return frozenset()
        own = {"input_image", "resize", "max_area", "tile_size", "tile_stride"}
        return frozenset(own | {"end_image"} if "mask" in facts.planes else own)

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        if set(facts.planes) != {"mask", "image"}:
            return frozenset()
        return frozenset({"input_image", "end_image"} if facts.has_image_positions else {"input_image"})

    def applies(self, inputs: ImageInputs, parts: Components) -> bool:
        if inputs.input_image is None:
            _check_absent(inputs, parts)
            return tuple(parts.facts.planes) == ("image",)
        if inputs.end_image is None and parts.facts.has_image_positions:
            raise ArgumentError(
                "This model draws what lies between two pictures, and end_image is missing; give end_image=, "
                "or load an I2V model."
            )
        return True

    def needs_encoder(self, inputs: ImageInputs, parts: Components) -> bool:
        return inputs.input_image is not None

    def check(self, inputs: ImageInputs, geometry: Geometry, parts: Components) -> None:
        for name in ("input_image", "end_image"):
            if (picture := getattr(inputs, name)) is not None:
                check_picture(picture, name)
        if inputs.input_image is not None and parts.facts.holds_first_frame and geometry.num_frames == 1:
            raise ArgumentError(
                "num_frames is 1 and input_image is the first frame: nothing is left to make; give 5 or more."
            )
        if inputs.end_image is not None and geometry.num_frames == 1:
            raise ArgumentError("end_image was given and num_frames is 1; give 5 or more frames.")

    def encode(self, inputs: ImageInputs, geometry: Geometry, parts: Components) -> Contribution:
        import torch

        from diffsynth.video.lazy_video import LazyVideo

        shape = (geometry.num_videos, *geometry.latent_shape[1:])
        if inputs.input_image is None:
            return Contribution(planes={"image": (torch.zeros(shape, device=parts.device), None)})
        if "image" not in parts.facts.planes:
            return Contribution(latents=LatentPlan(pinned=self._first_latent(inputs, geometry, parts)))
        video = fitted(inputs.input_image, inputs, geometry)
        if "mask" not in parts.facts.planes:
            plane = torch.zeros((1, *shape[1:]), device=parts.device)
            plane[:, :, :1] = self._encode(video, inputs, parts)
            return Contribution(planes={"image": (plane.expand(shape), None)})
        has_end = inputs.end_image is not None
        ends = []
        if inputs.end_image is not None:
            ends.append(fitted(inputs.end_image, inputs, geometry).to(video.device))
        num_between = geometry.num_frames - 1 - has_end
        whole = LazyVideo(
            (1, 3, geometry.num_frames, geometry.height, geometry.width),
            lambda: chain([video], repeat(torch.zeros_like(video), num_between), ends),
        )
        plane = self._encode(whole, inputs, parts)
        mask = known_frames(geometry, has_end=has_end).to(plane.device)
        first = plane[:, :, :1].expand(geometry.num_videos, -1, -1, -1, -1)
        return Contribution(
            planes={
                "mask": (mask.expand(geometry.num_videos, -1, -1, -1, -1), None),
                "image": (plane.expand(shape), None),
            },
            latents=LatentPlan(pinned=first) if parts.facts.holds_first_frame else None,
        )

    def _first_latent(self, inputs: ImageInputs, geometry: Geometry, parts: Components) -> Tensor:
        """(B, C, 1, h, w), the same for all videos of a batch; with ``max_area`` resized as officially."""
        from diffsynth.video import covering_tensor

        assert inputs.input_image is not None
        if inputs.max_area is None:
            video = fitted(inputs.input_image, inputs, geometry)
        else:
            video = covering_tensor(inputs.input_image, geometry.height, geometry.width)
        return self._encode(video, inputs, parts).expand(geometry.num_videos, -1, -1, -1, -1)

    def _encode(self, video: Tensor | LazyVideo, inputs: ImageInputs, parts: Components) -> Tensor:
        import torch

        assert parts.vae is not None
        with torch.no_grad():
            return parts.encode_video(video, tile_size=inputs.tile_size, tile_stride=inputs.tile_stride)


class ImageTokensConditioner:
    """What the image encoder sees, as tokens that cross-attention reads beside those of the text.

    It looks at the reference picture if there is one, else at the first frame, and for a model with positions
    of two pictures at the last frame too: as a whole with ``max_area``, as officially, else in the size of
    the video. A model that could look at a picture and is given none reads features of zeros.
    """

    Inputs: ClassVar[type] = ImageInputs
    encoder: ClassVar[str | None] = "image_encoder"

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        if not facts.has_image_branch:
            return frozenset()
        # a picture that is no frame of the video is a reference
        own = {"input_image", "resize", "max_area"} if "image" in facts.planes else set()
        own |= {"end_image"} if facts.has_image_positions else set()
        return frozenset(own | {"reference_image"} if "reference" in facts.adapters else own)

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset()

    def applies(self, inputs: ImageInputs, parts: Components) -> bool:
        return parts.facts.has_image_branch

    def needs_encoder(self, inputs: ImageInputs, parts: Components) -> bool:
        return inputs.input_image is not None or inputs.reference_image is not None

    def encode(self, inputs: ImageInputs, geometry: Geometry, parts: Components) -> Contribution:
        import torch

        encoder = parts.image_encoder
        first = inputs.input_image if inputs.reference_image is None else inputs.reference_image
        if first is None:
            count = IMAGE_TOKENS if encoder is None else encoder.num_tokens
            zeros = torch.zeros(geometry.num_videos, count, parts.facts.image_dim or 0, device=parts.device)
            return Contribution(image=(zeros, None))
        assert encoder is not None
        images = [first]
        if inputs.end_image is not None and parts.facts.has_image_positions:
            images.append(inputs.end_image)
        with torch.no_grad():
            features = encoder([_seen(image, inputs, geometry)[:, :, 0] for image in images])
        tokens = features.flatten(0, 1)[None]  # of two pictures: one sequence, those of the first first
        return Contribution(image=(tokens.expand(geometry.num_videos, -1, -1), None))


def _seen(image: Frame, inputs: ImageInputs, geometry: Geometry) -> Tensor:
    """A picture as the image encoder gets it; the log hears of changes where the VAE reads it."""
    from diffsynth.video import frames_to_tensor

    if inputs.max_area is not None:
        return _original(image, inputs, log=False)
    if image is inputs.reference_image:
        with about("reference_image", is_picture=True):
            return frames_to_tensor([image], geometry.height, geometry.width, inputs.resize, log=False)
    return fitted(image, inputs, geometry, log=False)


def _check_absent(inputs: ImageInputs, parts: Components) -> None:
    """No first frame was given: is that allowed?"""
    if inputs.end_image is not None:
        raise ArgumentError("end_image was given without input_image; give both.")
    if inputs.max_area is not None:
        raise ArgumentError(
            "max_area= was given without input_image=, whose proportions it takes; give height= and width=."
        )
    if set(parts.facts.planes) == {"mask", "image"}:
        raise ArgumentError(
            "This model continues a picture and input_image is missing; give input_image=, or load a "
            "text-to-video model."
        )

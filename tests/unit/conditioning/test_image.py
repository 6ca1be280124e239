"""Sizes that follow a picture, the mask of known frames, and where each picture goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.image import (
    ImageConditioner,
    ImageInputs,
    ImageTokensConditioner,
    known_frames,
    size_nearest,
    size_within,
)
from diffsynth.errors import ArgumentError, MissingModelError, UnusedInputError
from diffsynth.pipelines.unread import refuse_unreadable, require_encoder
from diffsynth.video.lazy_video import LazyVideo

I2V = {"mask": 4, "image": 16}


class Encoder:
    """Says which pictures it saw: a feature is the mean of a picture, and its height."""

    num_tokens = 3

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        rows = [torch.stack([p.mean(), torch.tensor(float(p.shape[2]))]) for p in pictures]
        return torch.stack([row.expand(self.num_tokens, 2) for row in rows])


@dataclass
class Parts:
    planes: Mapping[str, int] = field(default_factory=lambda: I2V)
    has_image_positions: bool = False
    image_encoder: Any = field(default_factory=Encoder)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def facts(self) -> DiTFacts:
        return DiTFacts(planes=self.planes, has_image_positions=self.has_image_positions, image_dim=2)

    @property
    def vae(self) -> Any:
        return object()

    def encode_video(self, video: torch.Tensor | LazyVideo, **tiles: object) -> torch.Tensor:
        """Every fourth frame, one pixel of 8 x 8, the mean of its colours on 16 channels."""
        video = video.whole() if isinstance(video, LazyVideo) else video
        return video[:, :, ::4, ::8, ::8].mean(1, keepdim=True).expand(-1, 16, -1, -1, -1)


def geometry(num_frames: int = 9, num_videos: int = 1) -> Geometry:
    return Geometry(
        num_videos=num_videos, num_frames=num_frames, height=32, width=48, latent_channels=16,
        latent_frames=(num_frames - 1) // 4 + 1, latent_height=4, latent_width=6,
    )  # fmt: skip


def flat(level: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


WHITE, BLACK = flat(255), flat(0)


# height and width of the picture, those at 1280 * 720 and at 832 * 480; facts of the official code
@pytest.mark.parametrize(
    ("size", "large", "small"),
    [
        ((480, 832), (720, 1248), (464, 832)),
        ((832, 480), (1248, 720), (832, 480)),
        ((720, 1280), (720, 1280), (464, 832)),
        ((1280, 720), (1280, 720), (832, 464)),
        ((1024, 1024), (960, 960), (624, 624)),
        ((1080, 1920), (720, 1280), (464, 832)),
        ((4032, 3024), (1104, 816), (720, 544)),
    ],
)
def test_sizes_follow_the_picture_as_officially(
    size: tuple[int, int], large: tuple[int, int], small: tuple[int, int]
) -> None:
    assert size_within(size, 1280 * 720, (16, 16)) == large
    assert size_within(size, 832 * 480, (16, 16)) == small


# height and width of the picture, those of TI2V at 1280 * 704; facts of the official code
@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((704, 1280), (704, 1280)),
        ((480, 832), (704, 1248)),
        ((720, 1280), (704, 1248)),
        ((1080, 1920), (704, 1248)),
        ((1280, 720), (1248, 704)),
        ((1024, 1024), (928, 960)),
        ((4032, 3024), (1088, 800)),
    ],
)
def test_sizes_of_ti2v_come_nearest_to_the_picture(size: tuple[int, int], found: tuple[int, int]) -> None:
    assert size_nearest(size, 1280 * 704, (32, 32)) == found


def test_an_area_of_one_row_takes_the_other_rounding() -> None:
    assert size_nearest((100, 1000), 32 * 320, (32, 32)) == (32, 320)
    assert size_nearest((100, 1130), 32 * 320, (32, 32)) == (32, 320)
    for area, words in ((99, "too small"), (0, "max_area is 0")):
        with pytest.raises(ArgumentError, match=words):
            size_nearest((480, 832), area, (32, 32))


@pytest.mark.parametrize(
    ("area", "words"), [(0, "max_area is 0"), (2.5, "max_area is 2.5"), (99, "too small")]
)
def test_an_area_without_pixels_is_told(area: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        size_within((480, 832), area, (16, 16))


def test_the_mask_tells_the_first_latent_and_the_last_frame() -> None:
    first, both = (known_frames(geometry(), has_end=end)[0, :, :, 0, 0] for end in (False, True))
    assert first.T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert both.T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert known_frames(geometry(1), has_end=False).shape == (1, 4, 1, 4, 6)


def test_frames_between_the_pictures_are_grey() -> None:
    inputs = ImageInputs(input_image=WHITE, end_image=BLACK)
    planes = ImageConditioner().encode(inputs, geometry(num_videos=2), Parts()).planes
    plane, negative = planes["image"]
    assert plane.shape == (2, 16, 3, 4, 6) and negative is None and planes["mask"][0].shape == (2, 4, 3, 4, 6)
    assert plane[1, 0, :, 0, 0].tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("planes", [{"image": 16}, {"control": 16, "image": 16}])
def test_without_a_mask_the_picture_stands_before_zeros(planes: dict[str, int]) -> None:
    given = ImageConditioner().encode(ImageInputs(input_image=WHITE), geometry(), Parts(planes=planes)).planes
    assert set(given) == {"image"} and given["image"][0][0, 0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_a_plane_that_stands_alone_is_zeros_without_a_picture() -> None:
    parts = Parts(planes={"image": 16})
    assert ImageConditioner().applies(ImageInputs(), parts)
    assert not ImageConditioner().needs_encoder(ImageInputs(), parts)
    plane = ImageConditioner().encode(ImageInputs(), geometry(), parts).planes["image"][0]
    assert plane.shape == (1, 16, 3, 4, 6) and not plane.any()
    assert not ImageConditioner().applies(ImageInputs(), Parts(planes={"control": 16, "image": 16}))


def tokens(parts: Parts, **given: Any) -> Tensor:
    inputs = ImageInputs(**given)
    assert ImageTokensConditioner().applies(inputs, parts)  # type: ignore[arg-type]
    told = ImageTokensConditioner().encode(inputs, geometry(num_videos=2), parts).image  # type: ignore[arg-type]
    assert told is not None and told[1] is None and told[0].shape[0] == 2
    return told[0][1]


def test_the_image_encoder_sees_the_first_frame_alone_unless_it_has_positions_of_two() -> None:
    both = {"input_image": WHITE, "end_image": BLACK}
    assert tokens(Parts(), **both).tolist() == [[1.0, 32.0]] * 3
    assert tokens(Parts(has_image_positions=True), **both)[:, 0].tolist() == [1.0] * 3 + [-1.0] * 3


def test_a_reference_picture_is_seen_in_place_of_the_first_frame() -> None:
    parts = Parts(planes={"control": 16, "image": 16})
    assert tokens(parts, input_image=WHITE, reference_image=BLACK)[0, 0] == -1.0
    assert tokens(parts, reference_image=BLACK)[0, 0] == -1.0


def test_without_a_picture_the_tokens_are_zeros_and_no_encoder_is_asked() -> None:
    parts = Parts(planes={"control": 16, "image": 16}, image_encoder=None)
    assert not tokens(parts).any() and tokens(parts).shape == (257, 2)
    assert not ImageTokensConditioner().needs_encoder(ImageInputs(), parts)  # type: ignore[arg-type]


def test_the_whole_picture_is_seen_with_max_area_and_the_cropped_one_without() -> None:
    # white in the middle, black on both sides: what is cropped away is black
    wide = flat(0, (96, 32))
    wide.paste(flat(255), (24, 0))
    assert tokens(Parts(), input_image=wide)[0].tolist() == [1.0, 32.0]
    mean, height = tokens(Parts(), input_image=wide, max_area=1536)[0].tolist()
    assert mean == pytest.approx(0.0, abs=0.01) and height == 32.0
    tall = flat(0, (96, 64))
    assert tokens(Parts(), input_image=tall)[0, 1] == 32.0
    assert tokens(Parts(), input_image=tall, max_area=1536)[0, 1] == 64.0


def test_the_last_picture_takes_the_proportions_of_the_first() -> None:
    parts = Parts(has_image_positions=True)
    seen = tokens(parts, input_image=flat(255, (96, 64)), end_image=flat(0, (200, 300)), max_area=1536)
    assert seen[:, 1].tolist() == [64.0] * 6


# planes of the model, arguments, class, words
REFUSED: list[tuple[Parts, dict[str, Any], type[Exception], str]] = [
    (Parts(planes={}), {"input_image": WHITE}, UnusedInputError, "reads no picture; I2V-14B, FLF2V-14B"),
    (Parts(), {}, ArgumentError, "input_image is missing; give input_image="),
    (Parts(), {"end_image": WHITE}, ArgumentError, "end_image was given without input_image"),
    (Parts(planes={}), {"max_area": 9999}, ArgumentError, "max_area= was given without input_image="),
    (Parts(has_image_positions=True), {"input_image": WHITE}, ArgumentError, "end_image is missing"),
    (
        Parts(planes={"image": 16}),
        {"input_image": WHITE, "end_image": WHITE},
        UnusedInputError,
        "no plane that says which frames are given",
    ),
]


@pytest.mark.parametrize(
    ("parts", "given", "kind", "words"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_pictures_that_do_not_fit_the_model_are_refused(
    parts: Parts, given: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        refuse_unreadable(given, parts.facts)
        ImageConditioner().applies(ImageInputs(**given), parts)  # type: ignore[arg-type]


def test_resize_that_nothing_reads_is_refused() -> None:
    with pytest.raises(UnusedInputError, match="no input_image that it could fit"):
        ImageInputs(resize="stretch")
    with pytest.raises(UnusedInputError, match="max_area= keeps the picture's proportions"):
        ImageInputs(input_image=WHITE, resize="stretch", max_area=1536)


def test_an_end_without_a_beginning_in_time_is_refused() -> None:
    inputs = ImageInputs(input_image=WHITE, end_image=BLACK)
    with pytest.raises(ArgumentError, match="num_frames is 1; give 5 or more"):
        ImageConditioner().check(inputs, geometry(1), Parts())  # type: ignore[arg-type]


def test_a_missing_image_encoder_is_told() -> None:
    with pytest.raises(MissingModelError, match="models_clip_open-clip"):
        require_encoder(ImageTokensConditioner(), ImageInputs(input_image=WHITE), Parts(image_encoder=None))  # type: ignore[arg-type]

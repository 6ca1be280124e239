"""An error about a picture names the input that it is of, and comes before any network is asked."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from diffsynth.errors import ArgumentError
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.pipelines.counting import calls_of

PICTURE, VIDEO = torch.rand(3, 32, 48), torch.rand(5, 3, 32, 48)
CONTROL = {"control_video": VIDEO}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "t2v",
        {"input_video": "a.mp4", "denoising_strength": 0.5},
        "^input_video is 'a.mp4'; open a file",
    ),
    ("i2v", {"input_image": "a.png"}, "^input_image is 'a.png'; open a file first"),
    ("i2v", {"input_image": VIDEO}, r"^input_image has the shape \(5, 3, 32, 48\)"),
    ("flf2v", {"input_image": PICTURE, "end_image": 5}, "^end_image is of type int; give PIL pictures"),
    ("reference", {**CONTROL, "reference_image": "a.png"}, "^reference_image is 'a.png'; open a file first"),
    ("control", {"control_video": "a.mp4"}, "^control_video is 'a.mp4'; open a file first"),
    ("vace", {"vace_reference_image": "a.png"}, "^vace_reference_image is 'a.png'; open a file first"),
    ("vace", {"vace_reference_image": [PICTURE, PICTURE[:2]]}, r"^vace_reference_image has the shape \(2,"),
    (
        "vace",
        {"vace_video": VIDEO, "vace_video_mask": VIDEO[..., :32]},
        "^vace_video_mask is 32x32 and vace_video 48x32; give a mask of the video's proportions",
    ),
    ("camera", {"camera_control_direction": [[0.0] * 19] * 5}, "is a list; .* poses as camera_control_poses"),
]
# found only when every value is read
REFUSED_LATER: list[tuple[str, dict[str, Any], str]] = [
    ("i2v", {"input_image": 255 * PICTURE}, "^input_image has values from .* must lie in"),
    ("flf2v", {"input_image": PICTURE, "end_image": PICTURE * torch.nan}, "^end_image has values from nan"),
    ("i2v", {"input_image": 255 * PICTURE, "max_area": 1536}, "^input_image has values from"),
    ("reference", {**CONTROL, "reference_image": 255 * PICTURE}, "^reference_image has values from"),
    ("vace", {"vace_reference_image": 255 * PICTURE}, "^vace_reference_image has values from"),
    ("vace", {"vace_video": 255 * VIDEO}, "^frame 0 of vace_video has values from"),
    (
        "control",
        {"control_video": [*VIDEO[:2], PICTURE[:, :16], *VIDEO[3:]]},
        "^frame 2 of control_video is 48x16 and frame 0 48x32",
    ),
]


@cache
def pipe(kind: str) -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(toy_files(kind), torch_dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(("kind", "given", "words"), REFUSED)
def test_what_is_no_picture_is_refused_before_any_network_is_asked(
    kind: str, given: dict[str, Any], words: str
) -> None:
    made = pipe(kind)
    with calls_of(made.text_encoder, made.dit) as calls, pytest.raises(ArgumentError, match=words):
        made("a red circle", **given)
    assert calls == []


@pytest.mark.parametrize(("kind", "given", "words"), REFUSED_LATER)
def test_wrong_values_are_refused_with_the_name_of_their_input(
    kind: str, given: dict[str, Any], words: str
) -> None:
    made = pipe(kind)
    with calls_of(made.dit) as calls, pytest.raises(ArgumentError, match=words):
        made("a red circle", **given)
    assert calls == []


def test_a_mask_may_be_smaller_than_its_video() -> None:
    given = {"vace_video": VIDEO, "vace_video_mask": torch.ones(5, 1, 16, 24), "output_type": "latent"}
    made = pipe("vace")("a red circle", **given, num_inference_steps=1, cfg_scale=1.0)
    assert isinstance(made, torch.Tensor) and made.isfinite().all()

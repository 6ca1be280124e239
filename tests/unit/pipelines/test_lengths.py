"""A video of a wrong length is told before any network is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffsynth.errors import ArgumentError
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.pipelines.counting import calls_of

VIDEO = torch.zeros(9, 3, 32, 48)
FITTING = VIDEO[:5]

WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "t2v",
        {"input_video": VIDEO[:4], "denoising_strength": 0.5},
        "has 4 frames and num_frames is 5; give fit='hold'",
    ),
    ("t2v", {"input_video": VIDEO[:0], "denoising_strength": 0.5}, "input_video is empty; give 5 frames"),
    ("control", {"control_video": VIDEO}, "control_video has 9 frames .* give fit='trim'"),
    ("control", {"control_video": VIDEO[:3], "fit": "trim"}, "control_video has 3 frames .* give fit='hold'"),
    ("control", {"control_video": "edges.mp4"}, "open a file first"),
    ("vace", {"vace_video": VIDEO}, "vace_video has 9 frames"),
    ("vace", {"vace_video": FITTING, "vace_video_mask": VIDEO[:1]}, "vace_video_mask has 1 frames"),
]


@pytest.fixture(scope="module")
def pipes() -> dict[str, WanVideoPipeline]:
    return {
        kind: WanVideoPipeline.from_pretrained(toy_files(kind), torch_dtype=torch.float32, device="cpu")
        for kind in ("t2v", "control", "vace")
    }


@pytest.mark.parametrize(("kind", "given", "words"), WRONG)
def test_a_wrong_length_is_told_before_any_network_is_asked(
    pipes: dict[str, WanVideoPipeline], kind: str, given: dict[str, Any], words: str
) -> None:
    pipe = pipes[kind]
    encoders = [pipe.text_encoder, pipe.vae.encoder]  # type: ignore[union-attr]
    with calls_of(*encoders, pipe.dit) as calls, pytest.raises(ArgumentError, match=words):
        pipe("a red circle", **given)
    assert calls == []


def test_frames_that_come_one_by_one_are_counted_when_they_are_read(
    pipes: dict[str, WanVideoPipeline],
) -> None:
    given = {"seed": 0, "output_type": "latent"}
    whole = pipes["control"]("a red circle", control_video=FITTING, **given)
    assert torch.equal(pipes["control"]("a red circle", control_video=iter(FITTING), **given), whole)
    with pytest.raises(ArgumentError, match="control_video has 9 frames"):
        pipes["control"]("a red circle", control_video=iter(VIDEO), **given)

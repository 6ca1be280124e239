"""A user's video is as long as the video that is made, or the caller said what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.conditioning.clips import lazy_clip
from diffsynth.conditioning.conditioner import Geometry
from diffsynth.errors import ArgumentError

GEOMETRY = Geometry(
    num_videos=1, num_frames=5, height=16, width=32, latent_channels=16, latent_frames=2, latent_height=2,
    latent_width=4,
)  # fmt: skip


def pictures(count: int) -> list[Image.Image]:
    """Frame i is grey of level 10 i."""
    return [Image.new("RGB", (32, 16), (10 * i,) * 3) for i in range(count)]


def levels(frames: Any, fit: Any = None) -> list[int]:
    video = lazy_clip(frames, GEOMETRY, name="control_video", fit=fit).whole()
    assert video.shape == (1, 3, 5, 16, 32) and video.dtype == torch.float32
    return ((video[0, 0, :, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda frames: frames, id="list"),
        pytest.param(iter, id="iterator"),
        pytest.param(lambda frames: np.stack([np.asarray(f) for f in frames]), id="array"),
        pytest.param(
            lambda frames: torch.stack(
                [torch.from_numpy(np.array(f)).permute(2, 0, 1) / 255 for f in frames]
            ),
            id="floats",
        ),
    ],
)
@pytest.mark.parametrize(
    ("length", "fit", "made"),
    [
        (5, None, [0, 10, 20, 30, 40]),
        (5, "trim", [0, 10, 20, 30, 40]),
        (7, "trim", [0, 10, 20, 30, 40]),
        (3, "hold", [0, 10, 20, 20, 20]),
        (1, "hold", [0, 0, 0, 0, 0]),
    ],
)
def test_a_longer_video_is_trimmed_and_a_shorter_one_held(
    given: Any, length: int, fit: str | None, made: list[int]
) -> None:
    assert levels(given(pictures(length)), fit) == made


def test_no_frame_behind_the_last_wanted_one_is_asked_for() -> None:
    class Counted(list[Image.Image]):
        asked = 0

        def __iter__(self) -> Any:
            for frame in super().__iter__():
                self.asked += 1
                yield frame

    frames = Counted(pictures(50))
    levels(frames, "trim")
    assert frames.asked == 5


@pytest.mark.parametrize(
    ("frames", "fit", "words"),
    [
        (pictures(4), None, "control_video has 4 frames and num_frames is 5; give fit='hold', which repeats"),
        (pictures(4), "trim", "give fit='hold'"),
        (pictures(9), None, "give fit='trim', which keeps its first frames, or num_frames=9"),
        (pictures(8), None, "keeps its first frames\\.$"),
        (pictures(9), "hold", "give fit='trim'"),
        ([], "hold", "control_video is empty; give 5 frames"),
        (pictures(5), "trimm", 'fit is \'trimm\'; give "trim" or "hold"'),
        ([*pictures(4), Image.new("RGB", (16, 16))], None, "16x16"),
        ("a.mp4", None, "open a file first"),
        (Path("a.mp4"), None, "give pictures"),
        (torch.zeros(1, 3, 5, 16, 32), None, "give one video"),
        (torch.zeros(3, 16, 32), None, "control_video has 1 frames"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_made_to_fit_is_told(frames: Any, fit: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        levels(frames, fit)


def test_a_wrong_length_is_told_before_a_frame_is_read() -> None:
    class Unread(list[Image.Image]):
        def __iter__(self) -> Any:
            raise AssertionError("a frame was asked for")

    with pytest.raises(ArgumentError, match="has 9 frames"):
        lazy_clip(Unread(pictures(9)), GEOMETRY, name="control_video", fit=None)

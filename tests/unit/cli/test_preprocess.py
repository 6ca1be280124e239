"""``diffsynth preprocess``: a control video beside its source, as long and as fast."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import diffsynth
from diffsynth.cli.app import TaskName
from diffsynth.cli.preprocess import TASK_NAMES
from tests.pictures import smooth
from tests.unit.cli.running import Shell


@pytest.fixture
def source(tmp_path: Path) -> Path:
    diffsynth.save_video([smooth()] * 5, tmp_path / "in.mp4", fps=8)
    return tmp_path / "in.mp4"


def test_command_knows_every_task() -> None:
    assert [name.value for name in TaskName] == list(TASK_NAMES)


def test_grey_video(shell: Shell, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "grey.mp4"
    ran = shell("preprocess", source, out, "--task", "grey")
    assert (ran.status, ran.out) == (0, f"{out}: grey, 5 frames at 8 fps\n")
    made = diffsynth.VideoData(out)
    assert len(made) == 5 and made.fps == 8
    pixels = np.asarray(made[2]).astype(int)
    assert (pixels.max(axis=2) - pixels.min(axis=2)).max() <= 4, "within the codec's rounding"


def test_picture_and_folder(shell: Shell, tmp_path: Path) -> None:
    diffsynth.save_image(smooth(), tmp_path / "in.png")
    assert shell("preprocess", tmp_path / "in.png", tmp_path / "out.png", "--task", "grey").status == 0
    diffsynth.save_frames([smooth()] * 3, tmp_path / "frames")
    ran = shell("preprocess", tmp_path / "frames", tmp_path / "out.mp4", "--task", "grey", "--fps", "12")
    assert ran.status == 0 and "3 frames at 12 fps" in ran.out


def test_layout_is_drawn_from_boxes(shell: Shell, source: Path, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{"0": [4, 4, 20, 20], "4": [30, 20, 50, 40]}]))
    ran = shell("preprocess", source, tmp_path / "out.mp4", "--task", "layout", "--boxes", boxes)
    assert ran.status == 0, ran.err
    frames = [np.asarray(frame).astype(int) for frame in diffsynth.VideoData(tmp_path / "out.mp4")]
    assert len(frames) == 5 and frames[0].shape == (48, 64, 3)
    line, ground = frames[0][5, 12], frames[4][5, 12]
    assert line.max() < 90 and ground.min() > 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "layout"], "needs --boxes"),
        (["--task", "grey", "--boxes", "x.json"], "does not read it"),
        (["--task", "layout", "--boxes", "x.json"], "x.json cannot be read"),
        (["--task", "depth"], "needs model"),
        (["--task", "grey", "--download"], "reads none of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_made_is_said(
    shell: Shell, source: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    ran = shell("preprocess", source, tmp_path / "out.mp4", *arguments)
    assert ran.status == 1 and says in ran.err and not (tmp_path / "out.mp4").exists()


def test_boxes_that_are_none_are_refused(shell: Shell, source: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text('[{"0": [1, 2, 3]}]')
    arguments = ("--task", "layout", "--boxes", tmp_path / "boxes.json")
    ran = shell("preprocess", source, tmp_path / "out.mp4", *arguments)
    assert ran.status == 1 and "holds no boxes" in ran.err


def test_video_is_no_picture(shell: Shell, source: Path, tmp_path: Path) -> None:
    ran = shell("preprocess", source, tmp_path / "out.png", "--task", "grey")
    assert ran.status == 1 and "5 frames; name a video" in ran.err

"""Runs that share a name, and runs that are killed: whole videos, and nothing half-written.

pytest -m slow tests/end_to_end/test_shared_names.py
"""

from __future__ import annotations

import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffsynth import VideoData, read_metadata

ROOT = Path(__file__).parents[2]
LINE = ("generate", "a red circle moves right", "--steps", "2", "--crf", "0")  # lossless: compared by pixels


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "diffsynth", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder.parent)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, text=True, stdout=pipe, stderr=pipe, env=environment)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_two_processes_with_one_name_make_two_whole_videos(tmp_path: Path) -> None:
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        runs = [start(folder, *LINE, "--seed", str(seed), "--out", "cat.mp4") for seed in (1, 2)]
        for run in runs:
            _, err = run.communicate(timeout=300)
            assert run.returncode == 0, err
        assert names(folder) == ["cat.mp4", "cat_2.mp4"]
        assert {read_metadata(folder / name)["seed"] for name in names(folder)} == {1, 2}
        assert [len(list(VideoData(folder / name))) for name in names(folder)] == [17, 17]


@pytest.mark.slow
def test_after_a_kill_at_any_moment_the_video_is_the_same(tmp_path: Path) -> None:
    """The same line again, or `decode` where latents were left, in the very folder of the dead run."""
    line = (*LINE, "--seed", "5", "--out", "cat.mp4")
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    assert start(tmp_path / "whole", *line).wait(timeout=300) == 0
    duration_s = time.monotonic() - began
    expected = [np.asarray(frame) for frame in VideoData(tmp_path / "whole" / "cat.mp4")]
    drawn = random.Random(0)
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        run = start(folder, *line)
        try:
            run.wait(timeout=drawn.uniform(0.5, 1.0) * duration_s)  # the first half is imports
        except subprocess.TimeoutExpired:
            run.kill()
        run.communicate()
        latents = list(folder.glob("*.latents.safetensors"))
        steps = list(folder.glob("*.steps.safetensors"))  # of a slow machine: after each minute
        if not (folder / "cat.mp4").exists():
            again = ("decode", latents[0].name) if latents else line
            after = start(folder, *again)
            _, err = after.communicate(timeout=300)
            assert after.returncode == 0, err
        frames = [np.asarray(frame) for frame in VideoData(folder / "cat.mp4")]
        assert len(frames) == len(expected) and all(map(np.array_equal, frames, expected))
        rest = set(names(folder)) - {"cat.mp4", *(path.name for path in (*latents, *steps))}
        assert not rest or run.returncode == 0 or rest == {".claim-cat.mp4"}, shlex.join(rest)

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import diffsynth
from tests.pictures import numbered, smooth


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files; every frame of a video tells its number."""
    folder = tmp_path_factory.mktemp("media")
    diffsynth.save_video(numbered(31), folder / "long.mp4", fps=16)  # 64x48
    diffsynth.save_video(numbered(30), folder / "fast.mp4", fps=30)
    diffsynth.save_video(numbered(4), folder / "short.mp4", fps=16)
    diffsynth.save_video(numbered(10), folder / "slow.webm", fps=8)
    tall = (np.ascontiguousarray(np.swapaxes(frame, 0, 1)) for frame in numbered(9))
    diffsynth.save_video(tall, folder / "tall.mp4", fps=16)  # 48x64
    diffsynth.save_image(smooth(), folder / "still.png")
    whole = (folder / "long.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


Dataset = Callable[..., Path]


@pytest.fixture
def dataset(media: Path, tmp_path: Path) -> Dataset:
    """``dataset("long.mp4", ("short.mp4", "a cat"))`` makes a folder as v1 has it."""

    def make(*entries: str | Sequence[str], header: Sequence[str] = ("file_name", "text")) -> Path:
        root = tmp_path / "data"
        (root / "train").mkdir(parents=True, exist_ok=True)
        rows = [(entry, f"words of {entry}") if isinstance(entry, str) else tuple(entry) for entry in entries]
        for cell in {cell for row in rows for cell in row}:
            if (media / cell).is_file():
                shutil.copy(media / cell, root / "train" / cell)
        with (root / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([tuple(header), *rows])
        return root

    return make

"""Small datasets on the disk, and plans of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from diffsynth.training.dataset.clips import Clip, DatasetPlan, Item
from diffsynth.video import save_video
from tests.pictures import noise

HEIGHT, WIDTH, FRAMES = 32, 48, 5


def write_picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(HEIGHT, WIDTH, seed)).save(path)
    return path


def write_video(path: Path, seed: int = 0, num_frames: int = FRAMES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.stack([noise(HEIGHT, WIDTH, seed * 100 + i) for i in range(num_frames)])
    save_video(frames, str(path), fps=8, quality=9)
    return path


def clip(
    media: Path,
    caption: str = "a red ball",
    inputs: Mapping[str, object] | None = None,
    num_frames: int = 1,
    **changed: object,
) -> Clip:
    item = Item(media=media, name=media.name, caption=caption, inputs=dict(inputs or {}))  # type: ignore[arg-type]
    told = {
        "item": item, "dataset": "toy", "stem": media.stem, "indices": tuple(range(num_frames)),
        "height": HEIGHT, "width": WIDTH, **changed,
    }  # fmt: skip
    return Clip(**told)  # type: ignore[arg-type]


def pictures(folder: Path, count: int, captions: tuple[str, ...] = ("a red ball",)) -> DatasetPlan:
    """A plan of so many pictures, captions in turn."""
    clips = [
        clip(write_picture(folder / f"{i:02}.png", seed=i), captions[i % len(captions)]) for i in range(count)
    ]
    return DatasetPlan(clips=tuple(clips))

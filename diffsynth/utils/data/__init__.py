"""Where DiffSynth-Studio 2.x has what reads and writes videos; it lives in `diffsynth.video`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.data.video import (
    LowMemoryImageFolder,
    LowMemoryVideo,
    VideoData,
    crop_and_resize,
    save_frames,
    save_video,
)

if not TYPE_CHECKING:
    from diffsynth.data.video import __getattr__  # noqa: F401  (says that there is no sound)

__all__ = [
    "LowMemoryImageFolder",
    "LowMemoryVideo",
    "VideoData",
    "crop_and_resize",
    "save_frames",
    "save_video",
]

"""Videos under the names of DiffSynth-Studio 1.x; see `diffsynth.video`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names
from diffsynth.video import VideoData, save_frames, save_video
from diffsynth.video.pixels import cover as crop_and_resize

if not TYPE_CHECKING:
    _NO_SOUND = "this version reads and writes no sound; speech to video (Wan2.2-S2V-14B) is not built."
    __getattr__ = lazy_names(
        __name__, {}, {"save_video_with_audio": _NO_SOUND, "merge_video_audio": _NO_SOUND}
    )

__all__ = [
    "LowMemoryImageFolder",
    "LowMemoryVideo",
    "VideoData",
    "crop_and_resize",
    "save_frames",
    "save_video",
]


class LowMemoryVideo(VideoData):
    """The frames of a file in the size that they have."""

    def __init__(self, file_name: str | os.PathLike[str]) -> None:
        super().__init__(video_file=file_name)


class LowMemoryImageFolder(VideoData):
    """The pictures of a folder in the sizes that they have."""

    def __init__(self, folder: str | os.PathLike[str], file_list: Sequence[str] | None = None) -> None:
        super().__init__(image_folder=folder, file_list=file_list)

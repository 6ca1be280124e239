"""Videos and images in and out of files; the only package that knows PIL and ffmpeg.

`VideoData` reads, `save_video` (or `VideoWriter`, frame by frame) writes, `frames_to_tensor` and
`tensor_to_frames` stand between pictures and networks. Nothing here is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names

if TYPE_CHECKING:
    from diffsynth.video.images import covering_tensor, load_image, save_frames, save_image
    from diffsynth.video.paths import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_output_path
    from diffsynth.video.pixels import Frame, Resize, frames_to_tensor, picture_size, tensor_to_frames, to_pil
    from diffsynth.video.reading import VideoData
    from diffsynth.video.settings import read_metadata
    from diffsynth.video.writing import VideoWriter, save_video
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "Frame": "diffsynth.video.pixels",
            "IMAGE_SUFFIXES": "diffsynth.video.paths",
            "Resize": "diffsynth.video.pixels",
            "VIDEO_SUFFIXES": "diffsynth.video.paths",
            "VideoData": "diffsynth.video.reading",
            "VideoWriter": "diffsynth.video.writing",
            "check_output_path": "diffsynth.video.paths",
            "covering_tensor": "diffsynth.video.images",
            "frames_to_tensor": "diffsynth.video.pixels",
            "load_image": "diffsynth.video.images",
            "picture_size": "diffsynth.video.pixels",
            "read_metadata": "diffsynth.video.settings",
            "save_frames": "diffsynth.video.images",
            "save_image": "diffsynth.video.images",
            "save_video": "diffsynth.video.writing",
            "tensor_to_frames": "diffsynth.video.pixels",
            "to_pil": "diffsynth.video.pixels",
        },
    )

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Frame",
    "Resize",
    "VideoData",
    "VideoWriter",
    "check_output_path",
    "covering_tensor",
    "frames_to_tensor",
    "load_image",
    "picture_size",
    "read_metadata",
    "save_frames",
    "save_image",
    "save_video",
    "tensor_to_frames",
    "to_pil",
]

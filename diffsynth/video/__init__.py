"""Videos and images in and out of files; the only package that knows PIL and ffmpeg.

`VideoData` reads, `save_video` (or `VideoWriter`, frame by frame) writes, `frames_to_tensor` and
`tensor_to_frames` stand between pictures and networks. Nothing here imports torch or av before it is used.
"""

from diffsynth.video.images import covering_tensor, load_image, save_frames, save_image
from diffsynth.video.paths import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_output_path
from diffsynth.video.pixels import Frame, Resize, frames_to_tensor, picture_size, tensor_to_frames, to_pil
from diffsynth.video.reading import VideoData
from diffsynth.video.settings import read_metadata
from diffsynth.video.writing import VideoWriter, save_video

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

"""The pixels of a clip and of its inputs, cut and resized alike.

Letters: F frames, H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffsynth.pipelines.options import call_arguments
from diffsynth.training.dataset.clips import Clip
from diffsynth.training.dataset.columns import known_columns
from diffsynth.video import load_image
from diffsynth.video.pixels import resized
from diffsynth.video.reading import PICTURE_SUFFIXES, VideoFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipPixels:
    """What the encoders of a pipeline are given for one clip."""

    video: Tensor  # uint8 (F, H, W, 3)
    # Arguments of pipe(): pictures uint8 (H, W, 3), videos uint8 (F, H, W, 3), lists of pictures, plain
    # values. 8 bits as in the files, so that conditioners see what they see of a user's pictures.
    inputs: Mapping[str, Any]


def read_clip(clip: Clip) -> ClipPixels:
    """Decode a clip and its inputs.

    Raises:
        MediaNotFoundError: when a file is gone.
        MediaReadError: when a frame cannot be decoded; the text names file and frame.
    """
    import torch

    kinds = known_columns() if clip.item.inputs else {}
    inputs: dict[str, Any] = {}
    for name, value in clip.item.inputs.items():
        kind = kinds[name]
        if kind == "video" and isinstance(value, Path):
            aspect = clip.input_aspects.get(name, 1.0)
            inputs[name] = torch.from_numpy(_of_clip(clip, value, clip.input_indices[name], aspect))
        elif kind == "picture" and isinstance(value, Path):
            # What a clip shows and is no frame of it, the pipeline fits itself, on white or cut.
            keeps_size = call_arguments()[name].own_size
            picture = _whole(clip, value) if keeps_size else _of_clip(clip, value, (0,))[0]
            inputs[name] = torch.from_numpy(picture)
        elif kind == "pictures" and isinstance(value, tuple):
            pictures = [file for file in value if isinstance(file, Path)]
            inputs[name] = [torch.from_numpy(_whole(clip, file)) for file in pictures]
        else:
            inputs[name] = value
    video = torch.from_numpy(_of_clip(clip, clip.item.media, clip.indices, clip.pixel_aspect))
    return ClipPixels(video=video, inputs=inputs)


def read_frames(clip: Clip, numbers: Sequence[int]) -> NDArray[np.uint8]:
    """Decode some frames of a clip, without its inputs.

    Args:
        clip: of a plan.
        numbers: of its frames, 0 <= number < F.

    Returns:
        (len(numbers), H, W, 3) uint8.

    Raises:
        MediaNotFoundError, MediaReadError: as `read_clip`.
    """
    indices = [clip.indices[number] for number in numbers]
    return _of_clip(clip, clip.item.media, indices, clip.pixel_aspect)


def _of_clip(clip: Clip, file: Path, indices: Sequence[int], aspect: float = 1.0) -> NDArray[np.uint8]:
    """Frames of a file, whose pixels have this width over height, as a clip shows them, (F, H, W, 3)."""
    frames = np.empty((len(indices), clip.height, clip.width, 3), dtype=np.uint8)
    for number, picture in enumerate(_pictures(file, indices)):
        if picture is None:  # the same frame again
            frames[number] = frames[number - 1]
            continue
        if aspect != 1:
            shown = round(picture.height / min(aspect, 1.0)), round(picture.width * max(aspect, 1.0))
            picture = resized(picture, *shown, "stretch")  # noqa: PLW2901
        pixels = np.asarray(resized(picture, clip.height, clip.width, clip.resize))
        frames[number] = pixels[:, ::-1] if clip.flip else pixels
    return frames


def _pictures(file: Path, indices: Sequence[int]) -> Iterator[Any]:
    """PIL pictures of a file in the order of ``indices``; None where one is that before it."""
    if file.suffix.lower() in PICTURE_SUFFIXES:
        yield load_image(file)
        yield from (None for _ in indices[1:])
        return
    video = VideoFile(file)
    before: int | None = None
    for index in indices:
        yield None if index == before else video.frame(index)
        before = index


def _whole(clip: Clip, file: Path) -> NDArray[np.uint8]:
    """A picture in its own size, mirrored with its clip."""
    pixels = np.array(load_image(file))
    return np.ascontiguousarray(pixels[:, ::-1]) if clip.flip else pixels

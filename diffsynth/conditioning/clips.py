"""Videos given by the user, made as long as the video that is generated.

Letters: F pixel frames, H W height and width in pixels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import count, islice, repeat
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from diffsynth.announce import announce
from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.conditioning.conditioner import Geometry
    from diffsynth.video import Frame
    from diffsynth.video.lazy_video import LazyVideo
    from diffsynth.video.pixels import Frames

logger = logging.getLogger("diffsynth")

Fit: TypeAlias = Literal["trim", "hold"]
FITS = ("trim", "hold")


@contextmanager
def about(name: str, *, is_picture: bool = False) -> Iterator[None]:
    """Let an error about a frame say which input it is of.

    Args:
        name: of the argument.
        is_picture: whether the input is one picture, whose number says nothing.
    """
    try:
        yield
    except ArgumentError as error:
        text = str(error)
        told = re.sub(r"^frames ", f"{name} ", text)
        told = re.sub(r"^frame (\d+) ", f"{name} " if is_picture else rf"frame \1 of {name} ", told)
        if told == text:
            raise
        raise ArgumentError(told) from error


def check_picture(picture: Frame, name: str) -> None:
    """Raise for what is no picture, before any network is asked; its values are looked at later.

    Raises:
        ArgumentError: for a wrong type or shape.
    """
    from diffsynth.video import picture_size

    with about(name, is_picture=True):
        picture_size(picture)


def lazy_clip(frames: Frames, geometry: Geometry, *, name: str, fit: Fit | None) -> LazyVideo:
    """Return a user's video as the VAE is asked to encode it: read, cropped and resized while it is.

    Args:
        frames: a VideoData, pictures, or one tensor or array of them; real numbers lie in [0, 1].
        geometry: of the generation. Frames of another size are cropped in the middle and resized.
        name: of the argument, for errors.
        fit: what to do with a video of another length: "trim" keeps the first frames of a longer one, "hold"
            repeats the last frame of a shorter one, None refuses both.

    Returns:
        (1, 3, F, H, W) float32 in [-1, 1].

    Raises:
        ArgumentError: for an unknown ``fit``, an empty video or a length that ``fit`` does not mend; while it
            is read, for frames of unequal sizes, or a wrong shape, type or range.
    """
    from diffsynth.video.lazy_video import LazyVideo
    from diffsynth.video.pixels import normalised_frames

    height, width, wanted = geometry.height, geometry.width, geometry.num_frames
    _check_fit(fit)
    with about(name):
        counted = _counted(frames)
        length = _checked_length(counted, geometry, name, fit)
    if length != wanted:
        announce("%s has %d frames and %d are made: fit=%r.", name, length, wanted, fit)
    walks = count()  # what had to be changed is said once

    def read() -> Iterator[Tensor]:
        is_first = next(walks) == 0
        with about(name):
            for plane in normalised_frames(_held(counted, wanted), height, width, log=is_first, name=name):
                yield plane[None, :, None]

    return LazyVideo((1, 3, wanted, height, width), read)


def check_length(frames: Frames, geometry: Geometry, *, name: str, fit: Fit | None) -> None:
    """Raise where `lazy_clip` would, before a frame is read; what comes one by one is not counted.

    Args:
        frames: as in `lazy_clip`.
        geometry: of the generation.
        name: of the argument, for errors.
        fit: the same.

    Raises:
        ArgumentError: for an unknown ``fit``, what is no video, an empty one or a length that ``fit`` does
            not mend.
    """
    _check_fit(fit)
    if isinstance(frames, Iterator):
        return
    with about(name):
        _checked_length(_counted(frames), geometry, name, fit)


def _check_fit(fit: Fit | None) -> None:
    if fit is not None and fit not in FITS:
        raise ArgumentError(f'fit is {fit!r}; give "trim" or "hold", or leave it out.')


def _checked_length(counted: Frames, geometry: Geometry, name: str, fit: Fit | None) -> int:
    """Frames of a video whose number is known; raises for a number that ``fit`` does not mend."""
    length, wanted = _length_of(counted), geometry.num_frames
    if length == 0:
        raise ArgumentError(f"{name} is empty; give {wanted} frames.")
    mends = "trim" if length > wanted else "hold"
    if length != wanted and fit != mends:
        raise ArgumentError(_wrong_length(name, length, wanted, mends))
    return length


def _wrong_length(name: str, length: int, wanted: int, mends: str) -> str:
    does = "keeps its first frames" if mends == "trim" else "repeats its last frame"
    usable = (length - 1) // 4 * 4 + 1
    other = f", or num_frames={usable}" if usable == length else ""
    return f"{name} has {length} frames and num_frames is {wanted}; give fit={mends!r}, which {does}{other}."


def _held(frames: Frames, wanted: int) -> Iterator[Frame]:
    """The first ``wanted`` frames; the last one again where there are fewer."""
    from diffsynth.video.pixels import iterate_frames

    frame: Frame | None = None
    num_given = 0
    for num_given, frame in enumerate(islice(iterate_frames(frames), wanted), start=1):  # noqa: B007
        yield frame
    if frame is not None:
        yield from repeat(frame, wanted - num_given)


def _counted(frames: Frames) -> Frames:
    """``frames`` if their number is known, else a list of them; raises for what is no video."""
    from diffsynth.video.pixels import iterate_frames

    is_array = 0 < _ndim(frames) < 5
    is_sized = isinstance(frames, Sized) and not isinstance(frames, str | bytes) and not _ndim(frames)
    return frames if is_array or is_sized else list(iterate_frames(frames))


def _length_of(frames: Any) -> int:
    """Frames of a video; one tensor of three axes is one picture."""
    return 1 if 0 < _ndim(frames) < 4 else len(frames)


def _ndim(frames: object) -> int:
    return int(getattr(frames, "ndim", 0))  # of arrays and tensors; a VideoData has a method ``shape``

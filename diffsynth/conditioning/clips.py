"""Videos given by the user, made as long as the video that is generated.

Letters: F pixel frames, H W height and width in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sized
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from diffsynth.errors import ArgumentError
from diffsynth.video import frames_to_tensor
from diffsynth.video.pixels import iterate_frames

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.conditioning.conditioner import Geometry
    from diffsynth.video import Frame
    from diffsynth.video.pixels import Frames

logger = logging.getLogger("diffsynth")

Fit: TypeAlias = Literal["trim", "hold"]
FITS = ("trim", "hold")
CHANNELS = (1, 3, 4)


def clip_to_tensor(frames: Frames, geometry: Geometry, *, name: str, fit: Fit | None) -> Tensor:
    """Return a user's video as the tensor that the VAE is asked to encode.

    Args:
        frames: a VideoData, pictures, or one tensor or array of them; real numbers lie in [0, 1].
        geometry: of the generation. Frames of another size are cropped in the middle and resized.
        name: of the argument, for errors.
        fit: as in `fitted_frames`.

    Returns:
        (1, 3, F, H, W) float32 in [-1, 1].

    Raises:
        ArgumentError: as `fitted_frames`, and for frames of a wrong shape, type or range.
    """
    return frames_to_tensor(
        fitted_frames(frames, geometry, name=name, fit=fit), geometry.height, geometry.width
    )


def fitted_frames(frames: Frames, geometry: Geometry, *, name: str, fit: Fit | None) -> Iterator[Frame]:
    """Yield ``geometry.num_frames`` frames of a video, one at a time.

    Args:
        frames: as in `clip_to_tensor`.
        geometry: of the generation.
        name: of the argument, for errors.
        fit: what to do with a video of another length: "trim" keeps the first frames of a longer one, "hold"
            repeats the last frame of a shorter one, None refuses both.

    Raises:
        ArgumentError: at once for an unknown ``fit``, an empty video or a length that ``fit`` does not mend;
            at the frame for one whose size differs from the first.
    """
    if fit is not None and fit not in FITS:
        raise ArgumentError(f'fit is {fit!r}; give "trim" or "hold", or leave it out.')
    counted = _counted(frames)
    length, wanted = _length_of(counted), geometry.num_frames
    if length == 0:
        raise ArgumentError(f"{name} is empty; give {wanted} frames.")
    if length != wanted:
        mends = "trim" if length > wanted else "hold"
        if fit != mends:
            raise ArgumentError(_wrong_length(name, length, wanted, mends))
        logger.info("%s has %d frames and %d are made: fit=%r.", name, length, wanted, fit)
    return _of_one_size(counted, wanted, name)


def _wrong_length(name: str, length: int, wanted: int, mends: str) -> str:
    does = "keeps its first frames" if mends == "trim" else "repeats its last frame"
    usable = (length - 1) // 4 * 4 + 1
    other = f", or num_frames={usable}" if usable == length else ""
    return (
        f"{name} has {length} frames and num_frames is {wanted}; give fit={mends!r}, which {does}{other}."
    )


def _of_one_size(frames: Frames, wanted: int, name: str) -> Iterator[Frame]:
    first: tuple[int, ...] | None = None
    frame: Frame | None = None
    count = 0
    for frame in islice(iterate_frames(frames), wanted):
        size = _size_of(frame)
        if first is None:
            first = size
        elif size != first:
            raise ArgumentError(
                f"frame {count} of {name} is {_told(size)} and frame 0 is {_told(first)}; frames of one video "
                "have one size."
            )
        count += 1
        yield frame
    if frame is not None:
        yield from repeat(frame, wanted - count)


def _counted(frames: Frames) -> Frames:
    """``frames`` if their number is known, else a list of them; raises for what is no video."""
    is_array = 0 < _ndim(frames) < 5
    is_sized = isinstance(frames, Sized) and not isinstance(frames, str | bytes) and not _ndim(frames)
    return frames if is_array or is_sized else list(iterate_frames(frames))


def _length_of(frames: Any) -> int:
    """Frames of a video; one tensor of three axes is one picture."""
    return 1 if 0 < _ndim(frames) < 4 else len(frames)


def _ndim(frames: object) -> int:
    return int(getattr(frames, "ndim", 0))  # of arrays and tensors; a VideoData has a method ``shape``


def _size_of(frame: Any) -> tuple[int, ...]:
    """Height and width of a picture: PIL, or an array with its channels first or last."""
    if hasattr(frame, "getbands"):
        return frame.height, frame.width
    shape = tuple(getattr(frame, "shape", ()))
    if len(shape) == 3:
        return shape[1:] if shape[0] in CHANNELS and shape[2] not in CHANNELS else shape[:2]
    return shape


def _told(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}" if len(size) == 2 else f"of shape {size}"

"""Pictures as arrays and tensors.

Letters: B batch, F frames, H W height and width in pixels. A picture is 8 bits per channel (PIL, or uint8
(H, W, 3)) or real numbers in [0, 1] ((3, H, W), or (H, W, 3)); networks see float32 in [-1, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsynth.announce import announce
from diffsynth.errors import ArgumentError, NotFiniteError
from diffsynth.video.plain import ON_WHITE, ORIENTATION, SIXTEEN_BITS, over_white, plain_picture

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.video.reading import VideoData

logger = logging.getLogger("diffsynth")

Array: TypeAlias = NDArray[Any]
Frame: TypeAlias = Union[Image.Image, Array, "Tensor"]
Frames: TypeAlias = Union[Iterable[Frame], Array, "Tensor", "VideoData"]

Resize: TypeAlias = Literal["cover", "stretch", "contain"]

RESIZES = ("cover", "stretch", "contain")
_CHANNELS = (1, 3, 4)
_HOW = {
    "cover": "cropped in the middle and resized",
    "stretch": "stretched",
    "contain": "resized and set between black bars",
}
_TURNS_SIDES = (5, 6, 7, 8)  # values of EXIF's orientation that exchange height and width


def iterate_frames(frames: Frames | Frame) -> Iterator[Frame]:
    """Yield the frames one by one, without building a list.

    Args:
        frames: one picture, an iterable of pictures, or one tensor or array (F, 3, H, W) or (F, H, W, 3).

    Raises:
        ArgumentError: when ``frames`` is a path, or a batch of videos.
    """
    if isinstance(frames, str | bytes):
        raise ArgumentError(f"frames is {frames!r}; open a file first: VideoData({frames!r}).")
    if isinstance(frames, Image.Image):
        yield frames
    elif isinstance(frames, np.ndarray) or _is_tensor(frames):
        block: Any = frames
        if block.ndim > 4:
            raise ArgumentError(
                f"frames has the shape {tuple(block.shape)}; give one video, (F, 3, H, W) or (F, H, W, 3): "
                "frames[0] is the first of a batch."
            )
        yield from (block if block.ndim == 4 else [block])
    elif isinstance(frames, Iterable):
        yield from frames
    else:
        raise ArgumentError(f"frames is {frames!r}; give pictures, or a tensor of them.")


def as_rgb8(frame: Frame, index: int = 0, notes: set[str] | None = None) -> NDArray[np.uint8]:
    """Return a picture as uint8 (H, W, 3); real numbers in [0, 1] are rounded to the nearest level.

    Args:
        frame: a PIL picture of any mode, uint8 or uint16 (H, W[, 1 | 3 | 4]), or real (1 | 3 | 4, H, W) or
            (H, W, 3 | 4) in [0, 1]. Transparent parts lie over white.
        index: its number, for the error text.
        notes: gets what had to be changed, in words.

    Raises:
        ArgumentError: when the shape, the type or the range is none of these.
    """
    notes = set() if notes is None else notes
    if isinstance(frame, Image.Image) and frame.mode != "F":
        pixels, changes = plain_picture(frame)
        notes.update(changes)
        return pixels
    array = _plain_array(np.asarray(frame) if isinstance(frame, Image.Image) else frame, index)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(_channels_last(array, index, notes))
    return np.rint(_channels_last(_in_unit_range(array, index), index, notes) * 255.0).astype(np.uint8)


def picture_size(frame: Frame) -> tuple[int, int]:
    """Height and width of a picture in pixels, upright.

    Raises:
        ArgumentError: when it is no picture.
    """
    if isinstance(frame, Image.Image):
        is_turned = frame.getexif().get(ORIENTATION) in _TURNS_SIDES
        return (frame.width, frame.height) if is_turned else (frame.height, frame.width)
    array = _channels_last(_plain_array(frame, 0), 0)
    return array.shape[0], array.shape[1]


def frames_to_tensor(
    frames: Frames | Frame,
    height: int,
    width: int,
    resize: Resize = "cover",
    *,
    log: bool = True,
    name: str = "frames",
    advice: str = "",
) -> Tensor:
    """Return pictures as the tensor that networks ask for: those of `normalised_frames`, stacked.

    Returns:
        (1, 3, F, height, width) float32 in [-1, 1].
    """
    import torch

    planes = normalised_frames(frames, height, width, resize, log=log, name=name, advice=advice)
    return torch.stack(list(planes), dim=1)[None]


def normalised_frames(
    frames: Frames | Frame,
    height: int,
    width: int,
    resize: Resize = "cover",
    *,
    log: bool = True,
    name: str = "frames",
    advice: str = "",
) -> Iterator[Tensor]:
    """Yield pictures, one by one, as networks ask for them.

    Frames of another size are brought to the asked one (bicubic), as VideoData does, and the log says so, as
    it says what else had to be changed: EXIF turns, transparency (over white), grey, CMYK, 16 bits.
    Real-valued frames keep their precision and device.

    Args:
        frames: a VideoData, one picture, an iterable of pictures of one size, or one tensor or array
            (F, C, H, W); 8-bit pictures, or real numbers in [0, 1]. Grey ones get three equal channels.
        height: in pixels.
        width: in pixels.
        resize: "cover" crops in the middle to the asked shape first, "stretch" gives up the proportions,
            "contain" shows the whole picture between black bars.
        log: say it, at the end; False where the same pictures are read a second time.
        name: of the input, for the log.
        advice: how to lose nothing of a picture of other proportions, for the log.

    Yields:
        (3, height, width) float32 in [-1, 1], of each frame.

    Raises:
        ArgumentError: when there is no frame, frames are of unequal sizes, a frame has a wrong shape, type or
            range, or ``resize`` is unknown.
    """
    if resize not in RESIZES:
        raise ArgumentError(f"resize is {resize!r}; known: {', '.join(RESIZES)}.")
    notes: set[str] = set()
    first: tuple[int, int] | None = None
    for index, frame in enumerate(iterate_frames(frames)):
        plane, size = _normalised(frame, index, (height, width), resize, notes)
        first = first or size
        if size != first:
            raise ArgumentError(
                f"frame {index} is {size[1]}x{size[0]} and frame 0 {first[1]}x{first[0]}; give frames of one "
                "size (VideoData(..., height=, width=) crops and resizes each)."
            )
        yield plane
    if first is None:
        raise ArgumentError("frames is empty; give one frame or more.")
    if log and notes:
        logger.info("pictures were %s", "; ".join(sorted(notes)))
    if log and first != (height, width):
        is_cut = resize == "cover" and has_other_proportions(first, height, width)
        # What is cut away is gone: that is told to people without a log, too.
        (announce if is_cut else logger.info)(
            "%s of %dx%d %s %s to %dx%d%s",
            name, first[1], first[0], "were" if name == "frames" else "was", _HOW[resize], width, height,
            advice if is_cut else "",
        )  # fmt: skip


def has_other_proportions(size: tuple[int, int], height: int, width: int) -> bool:
    """Whether more than a row or column of pixels, of either picture, is lost when one fills the other."""
    left, top, right, bottom = crop_box(size, height, width)
    lost = (size[0] - (bottom - top), size[1] - (right - left))
    return any(
        cut > max(1.0, own / asked) for cut, own, asked in zip(lost, size, (height, width), strict=True)
    )


def tensor_to_frames(video: Tensor, rounding: Literal["round", "truncate"] = "round") -> NDArray[np.uint8]:
    """Return a decoded video as 8-bit pictures; values outside [-1, 1] are clamped.

    Args:
        video: (B, 3, F, H, W) in [-1, 1], any real dtype and device.
        rounding: "round" to the nearest level, or "truncate" as official Wan and v1 (half a level darker).

    Returns:
        (B, F, H, W, 3) uint8 on the CPU.

    Raises:
        ArgumentError: when the shape is another, or ``rounding`` is unknown.
        NotFiniteError: when a value is NaN or infinite; it would come out as a black or white video.
    """
    import torch

    if video.ndim != 5 or video.shape[1] != 3:
        raise ArgumentError(f"video has the shape {tuple(video.shape)}; give (B, 3, F, H, W).")
    if rounding not in ("round", "truncate"):
        raise ArgumentError(f'rounding is {rounding!r}; give "round" or "truncate".')
    if (
        video.numel() and not torch.isfinite(torch.stack(torch.aminmax(video))).all()
    ):  # NaN is kept by aminmax
        raise NotFiniteError(
            "The decoded video holds NaN or infinity. Load the VAE in float32 (torch_dtype=torch.float32, "
            "--dtype float32); if that does not help, the weights are damaged."
        )
    levels = ((video.detach().float() + 1.0) * 127.5).clamp_(0.0, 255.0)
    if rounding == "round":
        levels = levels.round_()
    frames: NDArray[np.uint8] = levels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
    return frames


def to_pil(frames: Frames | Frame) -> list[Image.Image]:
    """Return pictures as PIL images (RGB); takes whatever `save_video` takes.

    Raises:
        ArgumentError: as `as_rgb8`.
    """
    return [Image.fromarray(as_rgb8(frame, index)) for index, frame in enumerate(iterate_frames(frames))]


def crop_box(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Return the largest middle part of a picture with the proportions asked for.

    Args:
        size: height and width of the picture.
        height: of the shape asked for.
        width: of the shape asked for.

    Returns:
        left, top, right, bottom in pixels.

    Source: DiffSynth-Studio v1 ``diffsynth/data/video.py`` crop_and_resize (same rounding).
    """
    full_height, full_width = size
    if full_height / full_width < height / width:
        cut = max(1, int(full_height / height * width))
        left = (full_width - cut) // 2
        return left, 0, left + cut, full_height
    cut = max(1, int(full_width / width * height))
    top = (full_height - cut) // 2
    return 0, top, full_width, top + cut


def fit_box(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Return where a whole picture stands in the middle of ``width`` x ``height`` pixels.

    Args:
        size: height and width of the picture.
        height: of the place.
        width: of the place.

    Returns:
        left, top, right, bottom in pixels of the place.
    """
    scale = min(height / size[0], width / size[1])
    tall, wide = (max(1, min(n, round(own * scale))) for n, own in zip((height, width), size, strict=True))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return ``image`` cropped in the middle and resized (bicubic) to ``width`` x ``height`` pixels."""
    if image.size == (width, height):
        return image
    return image.crop(crop_box((image.height, image.width), height, width)).resize((width, height))


def resized(image: Image.Image, height: int, width: int, resize: Resize) -> Image.Image:
    """Return ``image`` in ``width`` x ``height`` pixels (bicubic); see `frames_to_tensor`."""
    if resize == "cover" or image.size == (width, height):
        return cover(image, height, width)
    if resize == "stretch":
        return image.resize((width, height))
    left, top, right, bottom = fit_box((image.height, image.width), height, width)
    place = Image.new("RGB", (width, height))
    place.paste(image.resize((right - left, bottom - top)), (left, top))
    return place


def _normalised(
    frame: Frame, index: int, size: tuple[int, int], resize: Resize, notes: set[str]
) -> tuple[Tensor, tuple[int, int]]:
    """One frame as (3, height, width) float32 in [-1, 1], and the size it had."""
    import torch

    if isinstance(frame, Image.Image) or _dtype_name(frame) == "uint8":
        image = Image.fromarray(as_rgb8(frame, index, notes))
        levels = torch.from_numpy(np.array(resized(image, *size, resize))).permute(2, 0, 1).contiguous()
        return levels.to(torch.float32).div_(127.5).sub_(1.0), (image.height, image.width)
    device = frame.device if isinstance(frame, torch.Tensor) else "cpu"
    unit = _channels_last(_in_unit_range(_plain_array(frame, index), index), index, notes)
    plane = torch.from_numpy(np.ascontiguousarray(unit)).to(device).permute(2, 0, 1)
    own = (plane.shape[1], plane.shape[2])
    return (plane if own == size else _resized_plane(plane, size, resize)) * 2.0 - 1.0, own


def _resized_plane(plane: Tensor, size: tuple[int, int], resize: Resize) -> Tensor:
    """(3, H, W) in [0, 1] -> (3, *size) in [0, 1]."""
    import torch

    own, asked = (plane.shape[1], plane.shape[2]), size
    left, top, right, bottom = crop_box(own, *size) if resize == "cover" else (0, 0, own[1], own[0])
    place = fit_box(own, *size)
    if resize == "contain":
        asked = (place[3] - place[1], place[2] - place[0])
    scaled = torch.nn.functional.interpolate(
        plane[None, :, top:bottom, left:right],
        size=asked,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )[0].clamp(0.0, 1.0)  # bicubic overshoots at edges
    if resize != "contain":
        return scaled
    barred = scaled.new_zeros(3, *size)
    barred[:, place[1] : place[3], place[0] : place[2]] = scaled
    return barred


def _is_tensor(value: object) -> bool:
    """Whether this is a torch tensor, told without importing torch."""
    return type(value).__module__.split(".")[0] == "torch"


def _dtype_name(frame: object) -> str:
    return str(getattr(frame, "dtype", "")).removeprefix("torch.")


def _plain_array(frame: object, index: int) -> Array:
    """Values of an array or tensor on the CPU: uint8 stays, bool, uint16 and reals become float32."""
    if _is_tensor(frame):
        tensor: Any = frame
        tensor = tensor.detach().cpu()
        frame = tensor.numpy() if _dtype_name(frame) == "uint8" else tensor.float().numpy()
    elif isinstance(frame, np.ndarray) and frame.dtype.kind in "fb":
        frame = frame.astype(np.float32, copy=False)
    elif isinstance(frame, np.ndarray) and frame.dtype == np.uint16:
        frame = frame.astype(np.float32) / np.float32(SIXTEEN_BITS)
    if isinstance(frame, str | bytes | PathLike):
        raise ArgumentError(f"frame {index} is {str(frame)!r}; open a file first: PIL.Image.open.")
    if isinstance(frame, list | tuple):
        raise ArgumentError(f"frame {index} is a list; give one video at a time: videos[0] is the first.")
    if not isinstance(frame, np.ndarray) or frame.dtype not in (np.uint8, np.float32):
        kind = (
            f"an array of {frame.dtype}"
            if isinstance(frame, np.ndarray)
            else f"of type {type(frame).__name__}"
        )
        raise ArgumentError(
            f"frame {index} is {kind}; give PIL pictures, uint8 arrays (H, W, 3) or real numbers in [0, 1]."
        )
    return frame


def _in_unit_range(array: Array, index: int) -> Array:
    """``array`` itself when all of it lies in [0, 1], allowing for the last bit of a bfloat16."""
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (low >= -1e-2 and high <= 1.0 + 1e-2):
        raise ArgumentError(
            f"frame {index} has values from {low:.4g} to {high:.4g}; real-valued frames must lie in [0, 1]. "
            "Convert first: (x + 1) / 2 from [-1, 1], x / 255 from 0..255, or clamp."
        )
    return np.clip(array, 0.0, 1.0) if low < 0.0 or high > 1.0 else array


def _channels_last(array: Array, index: int, notes: set[str] | None = None) -> Array:
    """(H, W, 3), from (H, W), (H, W, 1 | 3 | 4) or (1 | 3 | 4, H, W): over white, grey repeated."""
    if array.ndim == 2:
        array = array[:, :, None]
    is_last = array.ndim == 3 and array.shape[2] in _CHANNELS
    is_first = array.ndim == 3 and array.shape[0] in _CHANNELS
    if is_first and (not is_last or array.dtype != np.uint8):  # a tiny picture: each kind's own order wins
        array = array.transpose(1, 2, 0)
    elif not is_last:
        raise ArgumentError(
            f"frame {index} has the shape {array.shape}; give (H, W, 3) in 8 bits or (3, H, W) in [0, 1]."
        )
    if 0 in array.shape:
        raise ArgumentError(f"frame {index} has the shape {array.shape}; it holds no pixel.")
    if array.shape[2] == 4:
        if notes is not None:
            notes.add(ON_WHITE)
        return over_white(array)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array

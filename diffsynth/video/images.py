"""Single pictures and folders of pictures."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffsynth.errors import ArgumentError, MediaNotFoundError, MediaReadError, OutputPathError, absence
from diffsynth.video.paths import IMAGE_SUFFIXES, check_output_path, write_whole
from diffsynth.video.pixels import Frame, Frames, as_rgb8, frames_to_tensor, iterate_frames
from diffsynth.video.plain import plain_picture
from diffsynth.video.settings import TAG, pack

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("diffsynth")

# What Pillow raises for a damaged picture; a SyntaxError for broken chunks of a PNG and broken EXIF.
UNREADABLE_PICTURE = (Image.DecompressionBombError, OSError, ValueError, SyntaxError, struct.error)
_JPEG_COMMENT_BYTES = 65533  # a JPEG segment counts its bytes, and its count, in 16 bits


def save_image(
    image: Frame, save_path: str | os.PathLike[str], *, metadata: Mapping[str, object] | None = None
) -> None:
    """Write one picture; the extension tells the format.

    Args:
        image: PIL, uint8 (H, W, 3), or real (3, H, W) in [0, 1].
        save_path: ends in .png, .jpg, .jpeg or .webp; a missing folder is created.
        metadata: settings to keep inside a .png or .jpg, for `read_metadata`.

    Raises:
        OutputPathError: when the path cannot be written; nothing half-written is left behind.
        ArgumentError: when ``image`` has a wrong shape or range, or the format cannot hold ``metadata``.
    """
    write_image(image, save_path, metadata=metadata)


def write_image(
    image: Frame,
    save_path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, object] | None = None,
    overwrite: bool = True,
) -> Path:
    """As `save_image`; returns the real path, which is the next number where a file must stay.

    Args:
        image: as of `save_image`.
        save_path: as of `save_image`.
        metadata: as of `save_image`.
        overwrite: whether a file of this name is replaced.

    Raises:
        OutputPathError, ArgumentError: as `save_image`.
    """
    target = check_output_path(save_path, suffixes=IMAGE_SUFFIXES)
    picture = Image.fromarray(as_rgb8(image))
    options: dict[str, Any] = {}
    kind = target.suffix.lower()
    if kind in (".jpg", ".jpeg"):
        options["quality"] = 95  # Pillow's 75 shows blocks on flat colours
    if metadata is not None:
        text = picture_comment(target, metadata)
        if kind == ".png":
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt(TAG, text)
        else:
            options["comment"] = text.encode()
    return write_whole(target, lambda place: picture.save(place, **options), overwrite=overwrite)


def picture_comment(path: Path, metadata: Mapping[str, object]) -> str:
    """Return the text that keeps settings inside a picture.

    Raises:
        ArgumentError: when the format cannot hold it.
    """
    text, kind = pack(metadata), path.suffix.lower()
    if kind == ".png" or (kind in (".jpg", ".jpeg") and len(text.encode()) <= _JPEG_COMMENT_BYTES):
        return text
    raise ArgumentError(f"{path} cannot hold these settings; save as .png, or leave metadata out.")


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read one picture (RGB), upright; what else had to be changed stands in the log.

    Raises:
        MediaNotFoundError: when there is no such file.
        MediaReadError: when it is no picture.
    """
    if not Path(path).is_file():
        raise MediaNotFoundError(f"{path} {absence(path)}; give the path of a picture.")
    try:
        with Image.open(path) as image:
            pixels, changes = plain_picture(image)
    except UNREADABLE_PICTURE as error:
        raise MediaReadError(f"{path} cannot be read as a picture: {error}.") from error
    if changes:
        logger.info("pictures were %s: %s", "; ".join(changes), path)
    return Image.fromarray(pixels)


def covering_tensor(image: Frame, height: int, width: int) -> Tensor:
    """Return a picture scaled until it covers ``width`` x ``height`` pixels, and cropped in the middle.

    Other than `frames_to_tensor`, which crops before it scales: Lanczos, and on 8 bits per channel.

    Args:
        image: PIL, uint8 (H, W, 3), or real (3, H, W) in [0, 1].
        height: in pixels.
        width: in pixels.

    Returns:
        (1, 3, 1, height, width) float32 in [-1, 1].

    Raises:
        ArgumentError: as `frames_to_tensor`.

    Source: Wan2.2 ``wan/textimage2video.py`` i2v.
    """
    notes: set[str] = set()
    whole = Image.fromarray(as_rgb8(image, notes=notes))
    scale = max(width / whole.width, height / whole.height)
    scaled = whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    if notes:
        logger.info("pictures were %s", "; ".join(sorted(notes)))
    if whole.size != (width, height):
        logger.info("a picture of %dx%d was scaled and cropped to %dx%d", *whole.size, width, height)
    return frames_to_tensor([scaled.crop((left, top, left + width, top + height))], height, width)


def save_frames(frames: Frames, save_path: str | os.PathLike[str]) -> None:
    """Write each frame as ``0.png``, ``1.png`` ... into a folder, which is created if missing.

    Args:
        frames: whatever `save_video` takes.
        save_path: the folder.

    Raises:
        OutputPathError: when the folder or a file cannot be written.
        ArgumentError: when a frame has a wrong shape, type or range.
    """
    folder = Path(save_path)
    if folder.exists() and not folder.is_dir():
        raise OutputPathError(f"{save_path} is a file; give a folder for the numbered pictures.")
    for index, frame in enumerate(iterate_frames(frames)):
        save_image(as_rgb8(frame, index).copy(), folder / f"{index}.png")

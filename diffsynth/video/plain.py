"""Any picture made plain: upright, three channels, 8 bits, no alpha.

What had to be changed is said in words, so that a caller can log it once for a whole call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffsynth.errors import ArgumentError

ORIENTATION = 0x0112  # EXIF's tag: 1 is upright
UPRIGHT = 1
SIXTEEN_BITS = 65535
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_GREY_MODES = ("1", "L", "LA", "La")

TURNED = "turned upright, as their EXIF says"
ON_WHITE = "laid over white where they were transparent"
FROM_GREY = "given three equal channels (they were grey)"
FROM_16_BITS = "brought from 16 to 8 bits"


def plain_picture(image: Image.Image) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return a PIL picture as uint8 (H, W, 3), and what was done to it.

    EXIF turns are applied, transparent parts lie over white, grey, CMYK and others become RGB, 16 bits become
    8 (rounded).

    Raises:
        ArgumentError: for numbers that are no 16-bit picture.
    """
    notes = []
    if image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
        image = ImageOps.exif_transpose(image)
        notes.append(TURNED)
    if image.mode.startswith("I"):
        notes += [FROM_16_BITS, FROM_GREY]
        return np.repeat(_eight_bits(np.asarray(image))[:, :, None], 3, axis=2), tuple(notes)
    if image.mode in _GREY_MODES:
        notes.append(FROM_GREY)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        if pixels[:, :, 3].min(initial=255) < 255:
            notes.append(ON_WHITE)
        return over_white(pixels), tuple(notes)
    if image.mode not in (*_GREY_MODES, "RGB", "P"):
        notes.append(f"converted from {image.mode} to RGB")
    return np.asarray(image.convert("RGB")), tuple(notes)


def over_white(array: NDArray[Any]) -> NDArray[Any]:
    """(..., 4) -> (..., 3) of the same dtype: 8 bits, or real numbers in [0, 1]."""
    if array.dtype != np.uint8:
        opaque = array[..., 3:]
        blended: NDArray[Any] = array[..., :3] * opaque + (1.0 - opaque)
        return blended
    alpha = array[..., 3:].astype(np.float32) / 255.0
    return np.rint(array[..., :3] * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8)  # type: ignore[no-any-return]


def _eight_bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > SIXTEEN_BITS:
        raise ArgumentError(
            f"a picture of whole numbers holds {low} to {high}; 16 bits are 0 to {SIXTEEN_BITS}."
        )
    return np.rint(array / 257.0).astype(np.uint8)  # 65535 / 255

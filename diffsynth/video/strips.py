"""Several videos on one picture, to choose from: a row for each, its moments from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffsynth.errors import ArgumentError
from diffsynth.video.pixels import Frame, as_rgb8

MARGIN, LABEL_HEIGHT = 8, 20  # pixels
PAPER, INK = (24, 24, 24), (235, 235, 235)


def strips(rows: Sequence[Sequence[Frame]], labels: Sequence[str], *, width: int) -> NDArray[np.uint8]:
    """Draw one row of frames for each video.

    Args:
        rows: of each video the frames to show, all rows equally many and of one size.
        labels: of each row, written above it.
        width: that the picture has at most, in pixels; frames are made smaller to fit, never larger.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ArgumentError: for no rows, or rows of unequal lengths.
    """
    counts = {len(row) for row in rows}
    if len(counts) != 1 or len(rows) != len(labels) or 0 in counts:
        raise ArgumentError(
            f"{len(rows)} rows with {sorted(counts)} frames and {len(labels)} labels make no picture; give "
            "one label per row, and rows of equal length."
        )
    (columns,) = counts
    first = as_rgb8(rows[0][0])
    room = (width - MARGIN) // columns - MARGIN
    scale = min(1.0, max(1, room) / first.shape[1])
    cell = (max(1, round(first.shape[1] * scale)), max(1, round(first.shape[0] * scale)))  # width, height
    pitch = cell[1] + LABEL_HEIGHT + MARGIN
    font = ImageFont.load_default()
    words = [label.encode("ascii", "replace").decode() for label in labels]
    longest = max(math.ceil(font.getlength(label)) for label in words)
    size = (MARGIN + max(columns * (cell[0] + MARGIN), longest + MARGIN), MARGIN + len(rows) * pitch)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (row, label) in enumerate(zip(rows, words, strict=True)):
        top = MARGIN + index * pitch
        pen.text((MARGIN, top + 4), label, fill=INK, font=font)
        for column, frame in enumerate(row):
            picture = Image.fromarray(as_rgb8(frame)).resize(cell, Image.Resampling.BICUBIC)
            sheet.paste(picture, (MARGIN + column * (cell[0] + MARGIN), top + LABEL_HEIGHT))
    return np.asarray(sheet)

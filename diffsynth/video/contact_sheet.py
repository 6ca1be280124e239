"""Many small pictures with their words on one page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffsynth.errors import ArgumentError
from diffsynth.video.pixels import Frame, as_rgb8, resized, to_pil

GAP = 8  # pixels
LINE = 14  # pixels of a line of text
MIN_WIDTH = 240  # pixels of a cell, so that its title can be read
FONT_SIZE = 11
LETTERS_PER_PIXEL = 1 / 5.6  # of Pillow's own font at 11 points, measured on English text


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One entry of the page."""

    pictures: tuple[Frame, ...]  # side by side; none: the text says why
    title: str
    text: str = ""  # cut where it does not fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How cells are drawn. All are of one size."""

    size: tuple[int, int] = (135, 240)  # height and width of a picture, in pixels
    num_pictures: int = 2  # of a cell, at most
    num_lines: int = 4  # of text, under the pictures
    columns: int = 3  # cells in a row


def contact_sheet(cells: Iterable[Cell], layout: Layout | None = None) -> NDArray[np.uint8]:
    """Draw cells row by row.

    Args:
        cells: taken one by one.
        layout: of the page.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ArgumentError: when there is no cell.
    """
    layout = layout or Layout()
    drawn = [_draw(cell, layout) for cell in cells]
    if not drawn:
        raise ArgumentError("There is no clip to show on a contact sheet.")
    columns = min(layout.columns, len(drawn))
    width, height = drawn[0].size
    rows = math.ceil(len(drawn) / columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for number, cell in enumerate(drawn):
        row, column = divmod(number, columns)
        page.paste(cell, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return np.asarray(page)


def size_in(frame: Frame, *, num_pictures: int, width: int) -> tuple[int, int]:
    """Height and width at which so many pictures stand side by side in ``width`` pixels; never enlarged."""
    height, own = as_rgb8(frame).shape[:2]
    scale = min(1.0, max(1, (width - GAP) // num_pictures - GAP) / own)
    return max(1, round(height * scale)), max(1, round(own * scale))


def _draw(cell: Cell, layout: Layout) -> Image.Image:
    height, width = layout.size
    pictures = cell.pictures[: layout.num_pictures]
    page_width = max(MIN_WIDTH, layout.num_pictures * (width + GAP) - GAP)
    page = Image.new("RGB", (page_width, height + LINE * (layout.num_lines + 1)), "white")
    draw = ImageDraw.Draw(page)
    for number, picture in enumerate(to_pil(pictures) if pictures else []):
        page.paste(resized(picture, height, width, "contain"), (number * (width + GAP), LINE))
    if not pictures:
        draw.rectangle((0, LINE, width - 1, LINE + height - 1), outline="red")
    font = ImageFont.load_default(FONT_SIZE)
    letters = int(page_width * LETTERS_PER_PIXEL)
    draw.text((0, 0), cell.title[:letters], fill="blue", font=font)
    lines = textwrap.wrap(cell.text, letters, max_lines=max(1, layout.num_lines), placeholder=" ...")
    for number, line in enumerate(lines[: layout.num_lines]):
        draw.text((0, LINE + height + number * LINE), line, fill="black", font=font)
    return page

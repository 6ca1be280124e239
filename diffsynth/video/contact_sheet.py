"""Many small pictures with their words on one page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffsynth.errors import ArgumentError
from diffsynth.video.images import save_image
from diffsynth.video.pixels import Frame, resized, to_pil

COLUMNS = 3
THUMB = (135, 240)  # height and width in pixels of each picture
GAP = 8  # pixels
LINE = 14  # pixels of a line of text
NUM_LINES = 4  # of text, after the title
LETTERS_PER_PIXEL = 1 / 5.6  # of Pillow's own font at 11 points, measured on English text
FONT_SIZE = 11


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One entry of the page."""

    pictures: tuple[Frame, ...]  # side by side, at most two; none: the text says why
    title: str
    text: str = ""  # cut where it does not fit


def save_contact_sheet(cells: Iterable[Cell], path: Path, *, columns: int = COLUMNS) -> None:
    """Draw cells row by row and write the page.

    Args:
        cells: taken one by one.
        path: .png, .jpg or .webp.
        columns: cells in a row.

    Raises:
        ArgumentError: when there is no cell.
        OutputPathError: when the file cannot be written.
    """
    drawn = [_draw(cell) for cell in cells]
    if not drawn:
        raise ArgumentError("There is no clip to show on a contact sheet.")
    columns = min(columns, len(drawn))
    width, height = drawn[0].size
    rows = math.ceil(len(drawn) / columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for number, cell in enumerate(drawn):
        row, column = divmod(number, columns)
        page.paste(cell, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    save_image(page, path)


def _draw(cell: Cell) -> Image.Image:
    height, width = THUMB
    page = Image.new("RGB", (2 * width + GAP, height + LINE * (NUM_LINES + 1)), "white")
    draw = ImageDraw.Draw(page)
    for number, picture in enumerate(to_pil(cell.pictures[:2]) if cell.pictures else []):
        page.paste(resized(picture, height, width, "contain"), (number * (width + GAP), 0))
    if not cell.pictures:
        draw.rectangle((0, 0, width - 1, height - 1), outline="red")
    font = ImageFont.load_default(FONT_SIZE)
    letters = int(page.width * LETTERS_PER_PIXEL)
    lines = [
        cell.title[:letters],
        *textwrap.wrap(cell.text, letters, max_lines=NUM_LINES, placeholder=" ..."),
    ]
    for number, line in enumerate(lines):
        draw.text((0, height + number * LINE), line, fill="black" if number else "blue", font=font)
    return page

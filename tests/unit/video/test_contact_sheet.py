"""One page of pictures and words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffsynth.errors import ArgumentError
from diffsynth.video.contact_sheet import Cell, Layout, contact_sheet, size_in

RED = (200, 0, 0)


def cell(count: int, text: str = "") -> Cell:
    return Cell(pictures=(Image.new("RGB", (640, 320), RED),) * count, title="name", text=text)


def test_cells_fill_rows_and_pictures_stand_under_their_title() -> None:
    layout = Layout(size=(20, 160), num_pictures=2, num_lines=1, columns=2)
    page = contact_sheet([cell(2), cell(1, "words"), cell(0, "why there is none")], layout)
    assert page.shape == (8 + 2 * (14 + 20 + 14 + 8), 8 + 2 * (160 + 8 + 160 + 8), 3)
    assert [tuple(page[8 + 14 + 10, 8 + left]) for left in (80, 168 + 80, 336 + 80)] == [RED] * 3
    assert tuple(page[8 + 14 + 10, 8 + 336 + 168 + 80]) == (255, 255, 255), "one picture, room for two"
    assert tuple(page[8 + 56 + 14, 8 + 10]) == (255, 0, 0), "a red frame where there is no picture"
    words = page[8 + 14 + 20 : 8 + 14 + 20 + 14, 8:]
    assert (words[:, :336] == 255).all() and (words[:, 336:] < 128).any()


def test_wide_pictures_are_made_to_fit_and_small_ones_are_left() -> None:
    wide, small = Image.new("RGB", (640, 320)), np.zeros((16, 32, 3), np.uint8)
    assert size_in(wide, num_pictures=4, width=400) == (45, 90)
    assert size_in(small, num_pictures=4, width=400) == (16, 32)


def test_long_words_are_cut_and_a_page_without_cells_is_refused() -> None:
    short, long = (contact_sheet([cell(1, "word " * count)], Layout(num_pictures=1)) for count in (9, 900))
    assert short.shape == long.shape
    with pytest.raises(ArgumentError, match="no clip to show"):
        contact_sheet([])

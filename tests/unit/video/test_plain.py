"""Pictures of every kind become upright RGB of the size asked for, and the log says what was done."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import ArgumentError, MediaNotFoundError, MediaReadError
from diffsynth.video import VideoData, frames_to_tensor, load_image, picture_size
from diffsynth.video.pixels import as_rgb8, fit_box
from tests.pictures import smooth

RAMP = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)


def said(caplog: pytest.LogCaptureFixture, picture: Any) -> str:
    with caplog.at_level(logging.INFO, "diffsynth"):
        frames_to_tensor([picture, picture], *picture_size(picture))
    return caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_applied(orientation: int, tmp_path: Path) -> None:
    upright = Image.fromarray(smooth())
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "0.png", exif=exif)
    opened = Image.open(tmp_path / "0.png")
    assert picture_size(opened) == (48, 64)
    for read in (as_rgb8(opened), load_image(tmp_path / "0.png"), VideoData(image_folder=tmp_path)[0]):
        assert np.array_equal(np.asarray(read), smooth())


def test_transparent_parts_lie_over_white(caplog: pytest.LogCaptureFixture) -> None:
    levels = np.dstack([smooth(), np.full((48, 64), 51, np.uint8)])  # a fifth
    expected = smooth() / 5 + 255 * 0.8
    assert np.abs(as_rgb8(Image.fromarray(levels)) - expected).max() <= 0.5
    assert np.array_equal(as_rgb8(levels), as_rgb8(Image.fromarray(levels)))
    unit = torch.from_numpy(levels).permute(2, 0, 1) / 255
    made = (frames_to_tensor(unit, 48, 64)[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(made - expected).max() < 1e-3
    assert said(caplog, Image.fromarray(levels)).count("laid over white") == 1


def test_a_palette_with_a_transparent_colour_lies_over_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.info["transparency"] = 0
    assert as_rgb8(picture).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_an_opaque_picture_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    opaque = Image.fromarray(smooth()).convert("RGBA")
    assert np.array_equal(as_rgb8(opaque), smooth()) and "pictures were" not in said(caplog, opaque)


def test_grey_cmyk_and_16_bits_are_converted_and_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    grey = Image.fromarray(smooth()[:, :, 0])
    assert np.array_equal(as_rgb8(grey), np.repeat(smooth()[:, :, :1], 3, axis=2))
    assert "three equal channels" in said(caplog, grey)
    caplog.clear()
    assert "converted from CMYK" in said(caplog, Image.fromarray(smooth()).convert("CMYK"))
    caplog.clear()
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    deep = Image.open(tmp_path / "deep.png")
    assert np.abs(as_rgb8(deep)[:, :, 1] - RAMP / 257).max() <= 0.5
    assert "from 16 to 8 bits" in said(caplog, deep)


def test_an_array_of_16_bits_keeps_its_precision() -> None:
    tensor = frames_to_tensor(RAMP[None, :, :, None], 48, 64)
    assert torch.allclose(tensor[0, 0, 0], torch.from_numpy(RAMP / 65535 * 2 - 1).float(), atol=1e-6)


def test_whole_numbers_beyond_16_bits_are_refused() -> None:
    with pytest.raises(ArgumentError, match="holds 0 to 70000; 16 bits are 0 to 65535"):
        as_rgb8(Image.fromarray(np.array([[0, 70000]], np.int32)))


@pytest.mark.parametrize(("size", "box"), [((50, 100), (0, 10, 40, 30)), ((100, 50), (10, 0, 30, 40))])
def test_a_contained_picture_stands_between_black_bars(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert fit_box(size, 40, 40) == box
    white = np.full((*size, 3), 255, np.uint8)
    left, top, right, bottom = box
    for frame in (white, torch.ones(3, *size)):
        made = frames_to_tensor([frame], 40, 40, "contain")[0, :, 0]
        assert (made[:, top:bottom, left:right] > 0.999).all()  # weights of bicubic add up to 1 but for a bit
        assert int((made > 0.999).sum()) == 3 * 20 * 40 and int((made == -1).sum()) == 3 * 20 * 40


def test_a_stretched_picture_shows_all_of_itself() -> None:
    half = np.concatenate([np.zeros((8, 32, 3), np.uint8), np.full((8, 32, 3), 255, np.uint8)], axis=1)
    made = frames_to_tensor([half], 16, 16, "stretch")[0, 0, 0]
    assert made.shape == (16, 16) and made[:, 0].max() == -1 and made[:, -1].min() == 1
    unit = torch.from_numpy(half).permute(2, 0, 1) / 255
    # PIL rounds to 8 bits after each of its two passes
    assert (frames_to_tensor([unit], 16, 16, "stretch")[0, 0, 0] - made).abs().max() <= 2 / 255 * 2
    with pytest.raises(ArgumentError, match="resize is 'crop'; known"):
        frames_to_tensor([half], 16, 16, "crop")  # type: ignore[arg-type]


def test_frames_of_unequal_sizes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="frame 1 is 64x40 and frame 0 64x48; give frames of one size"):
        frames_to_tensor([smooth(), smooth(40, 64)], 48, 64)


def test_a_file_that_is_no_picture_is_told(tmp_path: Path) -> None:
    with pytest.raises(MediaNotFoundError, match="does not exist"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MediaReadError, match="cannot be read as a picture"):
        load_image(tmp_path / "text.png")

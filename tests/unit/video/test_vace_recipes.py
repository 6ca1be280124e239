"""Recipes for VACE: what is kept stays as it was under a black mask, all else is grey under a white one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from diffsynth.errors import ArgumentError
from diffsynth.video.vace_recipes import GREY, Source, box_mask, extend, inpaint, keep, layout, outpaint
from tests.pictures import numbered_frame

WIDTH, HEIGHT = 32, 16


def clip(count: int, first: int = 0) -> list[np.ndarray]:
    return [numbered_frame(first + i, HEIGHT, WIDTH) for i in range(count)]


def arrays(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Video (F, H, W, 3) and whether the mask is white (F, H, W)."""
    assert len(source.video) == len(source.mask)
    assert all(v.mode == "RGB" and m.mode == "L" and v.size == m.size for v, m in zip(*source, strict=True))
    return np.stack(list(map(np.asarray, source.video))), np.stack(list(map(np.asarray, source.mask))) == 255


def check(source: Source, is_kept: np.ndarray, original: np.ndarray) -> None:
    video, mask = arrays(source)
    assert np.array_equal(mask, ~is_kept)
    assert np.array_equal(video[is_kept], original[is_kept]) and (video[~is_kept] == GREY).all()


@pytest.mark.parametrize("is_still", [False, True], ids=["mask-per-frame", "one-mask"])
def test_inpaint(is_still: bool) -> None:
    frames = clip(3)
    holes = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    holes[0 if is_still else slice(None, None, 2), 4:9, 5:20] = 255
    source = inpaint(frames, Image.fromarray(holes[0]) if is_still else list(holes))
    is_kept = np.broadcast_to(holes[:1], holes.shape) == 0 if is_still else holes == 0
    check(source, is_kept, np.stack(frames))


def test_grey_mask_keeps_its_values_and_cuts_at_the_middle() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(HEIGHT, 16)
    source = inpaint(np.full((1, HEIGHT, 16, 3), 7, np.uint8), ramp)
    assert np.array_equal(np.asarray(source.mask[0]), ramp)
    assert np.array_equal((np.asarray(source.video[0]) == GREY).all(axis=2), ramp > 127)


def test_outpaint() -> None:
    frames = clip(2)
    source = outpaint(frames, left=3, top=2, bottom=5)
    is_kept = np.zeros((2, 2 + HEIGHT + 5, 3 + WIDTH), bool)
    is_kept[:, 2 : 2 + HEIGHT, 3:] = True
    whole = np.zeros((*is_kept.shape, 3), np.uint8)
    whole[:, 2 : 2 + HEIGHT, 3:] = frames
    check(source, is_kept, whole)


FIRST, LAST = clip(2), clip(3, first=10)


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        (lambda: extend(FIRST, num_frames=9), {0: 0, 1: 1}),
        (lambda: extend(last=LAST, num_frames=9), {6: 10, 7: 11, 8: 12}),
        (lambda: extend(FIRST, LAST, num_frames=9), {0: 0, 1: 1, 6: 10, 7: 11, 8: 12}),
        (lambda: extend(FIRST[0], LAST[0], num_frames=9), {0: 0, 8: 10}),
        (lambda: keep({4: LAST[1]}, 9), {4: 11}),
        (lambda: keep({3: FIRST, -1: LAST[2]}, 9), {3: 0, 4: 1, 8: 12}),
    ],
    ids=["first", "last", "both", "pictures", "a-picture-inside", "a-clip-inside-and-the-last"],
)
def test_keep_and_extend(source: Callable[[], Source], kept: dict[int, int]) -> None:
    is_kept = np.zeros((9, HEIGHT, WIDTH), bool)
    is_kept[list(kept)] = True
    whole = np.stack([numbered_frame(kept.get(i, 0), HEIGHT, WIDTH) for i in range(9)])
    check(source(), is_kept, whole)


def test_boxes_move_evenly_and_rest_outside_their_places() -> None:
    track = {2: (4.0, 2.0, 9.0, 8.0), 6: (12.0, 6.0, 17.0, 12.0)}
    video, mask = arrays(layout(track, num_frames=9, height=HEIGHT, width=WIDTH))
    assert mask.all(), "a layout is followed, nothing of it is kept"
    filled = [np.asarray(m) == 255 for m in box_mask([track], num_frames=9, height=HEIGHT, width=WIDTH)]
    for number, x, y in ((0, 4, 2), (2, 4, 2), (4, 8, 4), (6, 12, 6), (8, 12, 6)):
        box = np.zeros((HEIGHT, WIDTH), bool)
        box[y : y + 7, x : x + 6] = True
        assert np.array_equal(filled[number], box)
        assert np.array_equal((video[number] == 0).all(axis=2), box), "lines of 3 pixels fill it"
    big = layout({0: (0, 0, 31, 15)}, num_frames=1, height=HEIGHT, width=WIDTH).video[0]
    assert big.getpixel((0, 0)) == (0, 0, 0) and big.getpixel((16, 8)) == (255, 255, 255)


BOX = {0: (0.0, 0.0, 4.0, 4.0)}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: inpaint([], FIRST), "frames is empty"),
        (lambda: inpaint(FIRST, clip(3)), "mask has 3 pictures and frames 2"),
        (lambda: inpaint(FIRST, Image.new("L", (8, 8))), "mask is 8x8 and frames are 32x16"),
        (lambda: outpaint(FIRST), "at least one above 0"),
        (lambda: outpaint(FIRST, left=-1, right=4), "0 or more"),
        (lambda: extend(num_frames=9), "neither first nor last"),
        (lambda: keep({}, 9), "one place or more"),
        (lambda: keep({8: FIRST}, 9), "from 0 to 7"),
        (lambda: keep({-10: FIRST}, 9), "from 0 to 7"),
        (lambda: keep({0: FIRST, 1: LAST}, 9), "both decide frame 1"),
        (lambda: keep({0: FIRST, 4: Image.new("RGB", (8, 8))}, 9), "frame 4 is 8x8"),
        (lambda: keep({0: [FIRST[0], Image.new("RGB", (8, 8))]}, 9), "32x16 and 8x8"),
        (lambda: layout([], num_frames=9, height=8, width=8), "0 tracks"),
        (lambda: layout([{}], num_frames=9, height=8, width=8), "holds no box"),
        (lambda: layout({9: BOX[0]}, num_frames=9, height=8, width=8), "give 0 to 8"),
        (lambda: layout({0: (4, 0, 4, 4)}, num_frames=9, height=8, width=8), "right above left"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_made_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        call()

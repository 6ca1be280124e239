"""Draws the pictures of vace.md with the recipes themselves: python docs/draw_vace.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diffsynth.video.vace_recipes import Source, box_mask, extend, inpaint, keep, layout, outpaint

FOLDER = Path(__file__).parent / "pictures"
WIDTH, HEIGHT, NUM_FRAMES, SHOWN = 96, 64, 9, 5
GAP = 4


def clip() -> list[Image.Image]:
    """A ball that rolls over a meadow."""
    frames = []
    for number in range(NUM_FRAMES):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[:40] = (150, 200, 235)
        pixels[40:] = (95, 160, 80)
        picture = Image.fromarray(pixels)
        draw = ImageDraw.Draw(picture)
        draw.rectangle((62, 22, 84, 44), fill=(150, 90, 60))
        draw.polygon(((58, 22), (73, 10), (88, 22)), fill=(120, 50, 40))
        left = 6 + 8 * number
        draw.ellipse((left, 38, left + 16, 54), fill=(220, 60, 50))
        frames.append(picture)
    return frames


def recipes() -> dict[str, Source]:
    """One of each, by the name of its picture."""
    video, size = clip(), {"num_frames": NUM_FRAMES, "height": HEIGHT, "width": WIDTH}
    ball = {0: (4, 36, 24, 56), 8: (68, 36, 88, 56)}
    other = {0: (6, 8, 30, 28), 8: (6, 40, 40, 60)}
    return {
        "inpaint": inpaint(video, box_mask(ball, **size)),
        "outpaint": outpaint(video, left=16, right=16, top=8),
        "extend": extend(video[:3], num_frames=NUM_FRAMES),
        "join": extend(video[:2], video[-2:], num_frames=NUM_FRAMES),
        "keep": keep({0: video[0], 4: video[4], -1: video[-1]}, NUM_FRAMES),
        "layout": layout([ball, other], **size),
    }


def strip(source: Source) -> Image.Image:
    """Some frames in a row, their masks below."""
    width, height = source.video[0].size
    step = (len(source.video) - 1) // (SHOWN - 1)
    sheet = Image.new("RGB", (SHOWN * (width + GAP) - GAP, 2 * height + GAP), "white")
    for row, pictures in enumerate((source.video, source.mask)):
        for column, picture in enumerate(pictures[::step]):
            framed = picture.convert("RGB")
            ImageDraw.Draw(framed).rectangle((0, 0, width - 1, height - 1), outline=(180, 180, 180))
            sheet.paste(framed, (column * (width + GAP), row * (height + GAP)))
    return sheet


def draw() -> Mapping[str, Image.Image]:
    """Every picture, by its name."""
    return {f"vace_{name}.png": strip(source) for name, source in recipes().items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, picture in draw().items():
        picture.save(FOLDER / name, optimize=True)

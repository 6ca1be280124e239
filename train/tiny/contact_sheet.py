"""Show what the tiny Wan makes of captions: `python -m train.tiny.contact_sheet docs/tiny_samples.png`."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from diffsynth import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from diffsynth.tiny.grammar import caption, random_scene

COLUMNS, FRAMES_SHOWN, TEXT_HEIGHT, GAP = 3, 5, 14, 8


def draw_sheet(captions: list[str], videos: list[list[Image.Image]]) -> Image.Image:
    """Cells of a caption over some frames of its video, evenly spaced in time."""
    width, height = videos[0][0].size
    cell = ((width + 2) * FRAMES_SHOWN + GAP, height + TEXT_HEIGHT + GAP)
    rows = -(-len(videos) // COLUMNS)
    sheet = Image.new("RGB", (cell[0] * COLUMNS + GAP, cell[1] * rows + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (text, video) in enumerate(zip(captions, videos, strict=True)):
        left, top = GAP + index % COLUMNS * cell[0], GAP + index // COLUMNS * cell[1]
        pen.text((left, top), text[:62], fill="black")
        for shown in range(FRAMES_SHOWN):
            frame = video[round(shown * (len(video) - 1) / (FRAMES_SHOWN - 1))]
            sheet.paste(frame, (left + shown * (width + 2), top + TEXT_HEIGHT))
    return sheet


def main() -> None:
    """Read the arguments, generate, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=tiny_folder())
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=6, help="captions with two shapes among them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-frames", type=int, default=17)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    captions = [
        caption(random_scene(rng, 2 if i >= given.count - given.pairs else 1), rng)
        for i in range(given.count)
    ]
    pipe = WanVideoPipeline.from_pretrained(given.model, torch_dtype=torch.float32, device="cpu")
    videos = pipe(captions, seed=given.seed, num_frames=given.num_frames)
    draw_sheet(captions, videos).save(given.out, optimize=True)


if __name__ == "__main__":
    main()

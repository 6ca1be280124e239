"""Show what the tiny Wan makes of captions: `python -m train.tiny.contact_sheet docs/tiny_samples.png`.

With ``--lora FILE --colour NAME`` each caption of that colour stands twice: without the LoRA, and with it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from diffsynth import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from diffsynth.tiny.grammar import TAUGHT_COLOURS, caption, random_scene, recoloured

FRAMES_SHOWN, TEXT_HEIGHT, GAP = 5, 14, 8


def draw_sheet(captions: list[str], videos: list[list[Image.Image]], columns: int) -> Image.Image:
    """Cells of a caption over some frames of its video, evenly spaced in time."""
    width, height = videos[0][0].size
    cell = ((width + 2) * FRAMES_SHOWN + GAP, height + TEXT_HEIGHT + GAP)
    rows = -(-len(videos) // columns)
    sheet = Image.new("RGB", (cell[0] * columns + GAP, cell[1] * rows + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (text, video) in enumerate(zip(captions, videos, strict=True)):
        left, top = GAP + index % columns * cell[0], GAP + index // columns * cell[1]
        pen.text((left, top), text[:62], fill="black")
        for shown in range(FRAMES_SHOWN):
            frame = video[round(shown * (len(video) - 1) / (FRAMES_SHOWN - 1))]
            sheet.paste(frame, (left + shown * (width + 2), top + TEXT_HEIGHT))
    return sheet


def main() -> None:
    """Read the arguments, generate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=tiny_folder())
    parser.add_argument("--count", type=int, default=24, help="captions")
    parser.add_argument("--pairs", type=int, default=6, help="captions with two shapes among them")
    parser.add_argument("--colour", choices=tuple(TAUGHT_COLOURS), help="of every first shape")
    parser.add_argument("--lora", type=Path, help="shown beside the model without it")
    parser.add_argument("--cfg-scale", type=float, help="strength of guidance; default: the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-frames", type=int, default=17)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    scenes = [random_scene(rng, 2 if i >= given.count - given.pairs else 1) for i in range(given.count)]
    if given.colour is not None:
        scenes = [recoloured(scene, given.colour) for scene in scenes]
    captions = [caption(scene, rng) for scene in scenes]
    pipe = WanVideoPipeline.from_pretrained(given.model, torch_dtype=torch.float32, device="cpu")
    call = {} if given.cfg_scale is None else {"cfg_scale": given.cfg_scale}
    videos = pipe(captions, seed=given.seed, num_frames=given.num_frames, **call)
    columns = 3
    if given.lora is not None:
        pipe.load_lora(given.lora)
        taught = pipe(captions, seed=given.seed, num_frames=given.num_frames, **call)
        videos = [video for both in zip(videos, taught, strict=True) for video in both]
        captions = [text for one in captions for text in (one, "with the LoRA")]
        columns = 2
    draw_sheet(captions, videos, columns).save(given.out, optimize=True)


if __name__ == "__main__":
    main()

"""Write drawn clips and their captions as a dataset: `python -m train.tiny.dataset FOLDER --colour lime`.

The folder is what ``diffsynth train`` reads: ``metadata.csv`` with the columns ``file_name,text``, and the
clips in ``train/``. A colour that the tiny Wan has never seen makes a small concept to teach; ordinary clips
among them keep what it knew.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
from pathlib import Path

from tqdm import tqdm

from diffsynth.tiny.draw import draw_clip
from diffsynth.tiny.grammar import TAUGHT_COLOURS, caption, random_scene, recoloured
from diffsynth.video import save_video
from train.tiny.data import SIZE

FPS = 8
CRF = 4  # nearly what was drawn: the clips are 64 x 64


def write_dataset(
    folder: Path, num_clips: int, colour: str | None = None, share: float = 0.5, num_frames: int = 17,
    seed: int = 0, pairs: float = 0.0,
) -> None:  # fmt: skip
    """Write ``num_clips`` clips and their captions.

    Args:
        folder: is made; files of the same names are replaced.
        num_clips: of the dataset.
        colour: one of `TAUGHT_COLOURS`; None: ordinary clips alone.
        share: of the clips that have it.
        num_frames: of each clip.
        seed: decides scenes and captions.
        pairs: share of the clips that show two things.
    """
    media = folder / "train"
    media.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file_name", "text"])
    for index in tqdm(range(num_clips), unit="clip", desc=str(folder)):
        scene = random_scene(rng, 1 + (pairs > 0 and rng.random() < pairs), num_frames)
        if colour is not None and index < share * num_clips:
            scene = recoloured(scene, colour)
        name = f"clip_{index:05d}.mp4"
        frames = draw_clip(scene, num_frames, SIZE).permute(0, 2, 3, 1).numpy()
        save_video(list(frames), media / name, fps=FPS, crf=CRF)
        rows.writerow([name, caption(scene, rng)])
    part = folder / "metadata.csv.part"
    part.write_text(table.getvalue(), encoding="utf-8")
    os.replace(part, folder / "metadata.csv")


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--colour", choices=tuple(TAUGHT_COLOURS))
    parser.add_argument("--share", type=float, default=0.5, help="of the clips that have the colour")
    parser.add_argument("--pairs", type=float, default=0.0, help="of the clips that show two things")
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_dataset(
        given.folder, given.clips, given.colour, given.share, given.num_frames, given.seed,
        given.pairs,
    )  # fmt: skip


if __name__ == "__main__":
    main()

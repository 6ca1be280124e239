"""Make the tiny Wan from nothing: `python -m train.tiny`, then two more lines.

    python -m train.tiny                              # the VAE, its decoder once more, the text encoder, data
    diffsynth train train/recipes/tiny.yaml           # the DiT, by the trainer that everything is trained by
    python -m train.tiny --stage ship --dit FILE      # its export becomes the package's

The first takes about two hours on two CPU cores, minutes on a GPU; may be cut off at any moment and started
again. Its learning rate follows the clock, so that a run ends when it is told to; weights therefore differ a
little from machine to machine. The tokenizer is made apart, by `python -m train.tiny.vocabulary`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.tiny import tiny_folder
from train.tiny import train_text, train_vae
from train.tiny.dataset import write_dataset
from train.tiny.export import write_dit

CLIPS = {17: 6000, 9: 1200, 25: 1200, 5: 600}  # of the DiT's dataset, by number of frames
PAIRS = 0.12  # share of scenes with two things, which are learnt last
STAGES = ("all", "vae", "polish", "text", "data", "ship")


def write_data(folder: Path, seed: int) -> None:
    """What `train/recipes/tiny.yaml` reads: a dataset for each number of frames."""
    for number, (num_frames, count) in enumerate(CLIPS.items()):
        target = folder / f"frames_{num_frames}"
        write_dataset(target, count, num_frames=num_frames, seed=seed + 1 + number, pairs=PAIRS)


def ship(export: Path, weights: Path) -> None:
    """Write the DiT that the trainer exported as a file of the package."""
    dit = ModelManager(torch_dtype=torch.bfloat16, device="cpu").load_models([export]).fetch_model(
        "wan_video_dit"
    )  # fmt: skip
    assert isinstance(dit, WanDiT)
    write_dit(dit, weights)


def main() -> None:
    """Read the arguments and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/tiny"), help="where the state of the run lies"
    )
    parser.add_argument("--weights", type=Path, default=tiny_folder(), help="where the finished files go")
    parser.add_argument("--data", type=Path, default=Path("data/tiny"), help="where the dataset goes")
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--vae-minutes", type=float, default=55.0)
    parser.add_argument("--polish-minutes", type=float, default=10.0)
    parser.add_argument("--text-minutes", type=float, default=60.0)
    parser.add_argument("--dit", type=Path, help="the trainer's .safetensors, for the stage ship")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if (given.dit is not None) != (given.stage == "ship"):
        parser.error("--stage ship needs --dit FILE, and no other stage reads it")
    device = torch.device(given.device)
    if given.stage in ("all", "vae", "polish", "text"):
        given.out.mkdir(parents=True, exist_ok=True)
    if given.stage in ("all", "vae"):
        train_vae.train(given.out, given.weights, given.vae_minutes, given.seed, device)
    if given.stage in ("all", "polish"):
        train_vae.polish(given.out, given.weights, given.polish_minutes, given.seed, device)
    if given.stage in ("all", "text"):
        train_text.train(given.out, given.weights, given.text_minutes, given.seed, device)
    if given.stage in ("all", "data"):
        write_data(given.data, given.seed)
    if given.stage == "ship":
        ship(given.dit, given.weights)


if __name__ == "__main__":
    main()

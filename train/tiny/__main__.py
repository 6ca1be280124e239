"""Make the tiny Wan from nothing: `python -m train.tiny`.

First the VAE, then its decoder once more, then the DiT with its text encoder.

Runs about two hours on two CPU cores, minutes on a GPU; may be cut off at any moment and started again. The
learning rate follows the clock, so that a run ends when it is told to; weights therefore differ a little from
machine to machine. The tokenizer is made apart, by `python -m train.tiny.vocabulary`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffsynth.tiny import tiny_folder
from train.tiny import train_dit, train_vae


def main() -> None:
    """Read the arguments and train both stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/tiny"), help="where the state of the run lies"
    )
    parser.add_argument("--weights", type=Path, default=tiny_folder(), help="where the finished files go")
    parser.add_argument("--stage", choices=("all", "vae", "polish", "dit"), default="all")
    parser.add_argument("--vae-minutes", type=float, default=55.0)
    parser.add_argument("--polish-minutes", type=float, default=10.0)
    parser.add_argument("--dit-minutes", type=float, default=60.0)
    parser.add_argument("--go-on", action="store_true", help="train the finished DiT further, in a new run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    if given.stage in ("all", "vae"):
        train_vae.train(given.out, given.weights, given.vae_minutes, given.seed, device)
    if given.stage in ("all", "polish"):
        train_vae.polish(given.out, given.weights, given.polish_minutes, given.seed, device)
    if given.stage in ("all", "dit"):
        train_dit.train(given.out, given.weights, given.dit_minutes, given.seed, device, goes_on=given.go_on)


if __name__ == "__main__":
    main()

"""Two experts for tests: the tiny Wan's one DiT in both roles, in official folders.

``python -m tests.pairs FOLDER`` writes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffsynth.tiny import tiny_folder

DIT = "diffusion_pytorch_model.safetensors"
ROLES = ("high_noise_model", "low_noise_model")


def write_tiny_pair(folder: Path) -> Path:
    """Write a repository of the tiny Wan with two experts of equal weights, and return its folder."""
    tiny = tiny_folder()
    for role in ROLES:
        file = folder / role / DIT
        file.parent.mkdir(parents=True)
        file.write_bytes((tiny / DIT).read_bytes())
    for file in tiny.rglob("*"):
        if file.is_file() and file.name != DIT:
            copy = folder / file.relative_to(tiny)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return folder


if __name__ == "__main__":
    write_tiny_pair(Path(sys.argv[1]))

"""The tiny Wan that ships with the package: where its files lie, and what its captions can say.

Importing this folder loads no torch: `grammar` is plain Python; `draw` and `measure` bring torch with them.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["tiny_folder"]


def tiny_folder() -> Path:
    """Return the folder of the shipped tiny Wan, ready for ``WanVideoPipeline.from_pretrained``."""
    return Path(__file__).resolve().parent / "weights"

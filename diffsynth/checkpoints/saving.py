"""Tensors into a .safetensors file that appears when it is complete, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.video.paths import replacing

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, is_private: bool = False
) -> None:
    """Write a safetensors file under a temporary name, make sure that it is on the disk, then rename it.

    Args:
        path: its folder exists; a file of this name is replaced.
        tensors: on any device, each with memory of its own.
        metadata: texts for the header.
        is_private: nobody but its owner can read the file.

    Raises:
        OutputPathError: when the disk is full or fails; nothing half-written stays.
    """
    from safetensors.torch import save

    # Written here and not by the library, whose errors do not tell a full disk from a wrong tensor.
    # A text that is not UTF-8 (half a character in another program's metadata) is kept as an escape.
    texts = {name: text.encode(errors="backslashreplace").decode() for name, text in metadata.items()}
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, texts)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    mode = 0o600 if is_private else 0o666
    with replacing(path) as temporary, open(os.open(temporary, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

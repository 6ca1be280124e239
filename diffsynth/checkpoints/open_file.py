"""Which kind of file this is, told by its first bytes; the name is only a hint."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from diffsynth.checkpoints.mapped import FileHeader
from diffsynth.checkpoints.safetensors_file import read_safetensors_header
from diffsynth.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedModelError, absence

RESAVE = 'torch.save(torch.load("OLD.pth", map_location="cpu", weights_only=True), "NEW.pth")'


def read_header(path: Path) -> FileHeader:
    """Return what ``path`` tells about itself without its weights being read.

    Raises:
        CheckpointNotFoundError: when there is no such file.
        CorruptCheckpointError: when it is empty, cut off, a text, a web page or a pointer of git-lfs.
        UnsafeCheckpointError: when it is a pickle that asks for more than tensors.
        UnsupportedModelError: when it is of a known kind that is not read (GGUF).
    """
    if not path.is_file():
        raise CheckpointNotFoundError(not_found(path))
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{":  # the length of a header before it may look like anything
        return read_safetensors_header(path)
    if start.startswith(b"PK\x03\x04"):
        from diffsynth.checkpoints.torch_file import (
            read_torch_header,
        )  # zipfile and pickle cost 20 ms to import

        return read_torch_header(path)
    _refuse_other_kinds(path, start)
    return read_safetensors_header(path)


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    if not start:
        raise CorruptCheckpointError(f"{path} is empty (0 bytes). Download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CorruptCheckpointError(
            f"{path} is a pointer of git-lfs, not the weights. Fetch them with `git lfs pull` in that folder."
        )
    if start.lstrip()[:1] == b"<":
        raise CorruptCheckpointError(
            f"{path} is a web page, not weights: the download failed. Download it again."
        )
    if start.startswith(b"GGUF"):
        raise UnsupportedModelError(
            f"{path} is a GGUF file, which this version does not read. Use the fp8 safetensors."
        )
    if start[:1] == b"\x80" and 2 <= start[1] <= 5 and path.suffix != ".safetensors":
        raise CorruptCheckpointError(
            f"{path} is in the format that torch wrote before 1.6, which cannot be mapped. Save it once "
            f"more: {RESAVE}"
        )
    if path.suffix != ".safetensors":
        raise CorruptCheckpointError(
            f"{path} is neither a torch file nor safetensors (it starts with {start[:8]!r}). It was cut off, "
            "or it is another kind of file under this name."
        )
    if start[:16].isascii() and start[:8].decode("ascii").isprintable():
        raise CorruptCheckpointError(
            f"{path} is a text, not safetensors (it starts with {start[:40].decode('ascii', 'replace')!r})."
        )


def not_found(path: Path) -> str:
    """Say that a path does not exist, with the nearest name in its folder."""
    if (why := absence(path)) != "does not exist":
        return (
            f"{path} {why}, or give the id of its repository, such as Wan-AI/Wan2.1-T2V-1.3B, with "
            "--download (download=True in Python)."
        )
    if path.parent.is_dir():
        near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "Its folder exists; look there with `ls`."
    else:
        existing = next((parent for parent in path.parents if parent.is_dir()), Path("."))
        hint = f"The folder {path.parent} does not exist either ({existing} does)."
    return f"{path} does not exist. {hint}"

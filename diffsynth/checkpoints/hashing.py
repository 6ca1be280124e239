"""Hashes that tell whether tensors and files are still the same, without reading all of what is large.

Up to a limit everything is read; beyond it some pieces, spread evenly from the first byte to the last. A
fine-tune changes nearly every number of a weight, a merged LoRA most of those of its layers, and a video that
was encoded anew all bytes, so that pieces tell them apart. One number changed by hand in a large weight may
go unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DIGEST_BYTES = 16
WHOLE_TENSOR_BYTES, TENSOR_PIECE_BYTES, NUM_TENSOR_PIECES = 1 << 20, 1 << 14, 4
WHOLE_FILE_BYTES, FILE_PIECE_BYTES, NUM_FILE_PIECES = 1 << 26, 1 << 20, 64


def hash_of_parts(parts: Iterable[str | bytes]) -> str:
    """Of texts and bytes, in their order: 32 hex digits."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def hash_of_tensors(tensors: Iterable[tuple[str, Tensor]], *, is_whole: bool = False) -> str:
    """Of names, shapes, dtypes and bytes, in their order.

    Args:
        tensors: on any device; those on the device "meta" have no bytes.
        is_whole: read every byte, however many there are.
    """
    import torch

    digest = blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.numel() or tensor.is_meta:
            continue
        data = tensor.detach().reshape(-1).view(torch.uint8)
        count = data.numel()
        if is_whole or count <= WHOLE_TENSOR_BYTES:
            pieces: Iterator[Tensor] = iter((data,))
        else:
            starts = _starts(count, TENSOR_PIECE_BYTES, NUM_TENSOR_PIECES)
            pieces = (data[start : start + TENSOR_PIECE_BYTES] for start in starts)
        for piece in pieces:
            digest.update(piece.cpu().numpy().tobytes())
    return digest.hexdigest()


def hash_of_file(path: Path) -> str:
    """Of a file's size and bytes.

    Raises:
        OSError: when it cannot be read.
    """
    size = path.stat().st_size
    digest = blake2b(str(size).encode(), digest_size=DIGEST_BYTES)
    is_whole = size <= WHOLE_FILE_BYTES
    starts = (
        range(0, size, FILE_PIECE_BYTES) if is_whole else _starts(size, FILE_PIECE_BYTES, NUM_FILE_PIECES)
    )
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(FILE_PIECE_BYTES))
    return digest.hexdigest()


def _starts(size: int, piece: int, count: int) -> list[int]:
    """Where pieces begin, so that the first byte and the last are in one."""
    return [(size - piece) * index // (count - 1) for index in range(count)]

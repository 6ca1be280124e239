"""One weights file on disk: where its tensors lie, and views of them through one memory map.

A dtype is spelled as in a safetensors header ("BF16", "F8_E4M3"), whatever the file kind. Nothing here
reads a weight until `MappedFile.view` is called; torch is imported there and nowhere else.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.errors import CorruptCheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {  # safetensors spelling: (bits of one element, name in torch or "" if torch has none)
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F6_E3M2": (6, ""),
    "F6_E2M3": (6, ""),
    "F4": (4, ""),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
    "C64": (64, "complex64"),
    "C128": (128, "complex128"),
}
SPELLING = {torch_name: name for name, (_, torch_name) in DTYPES.items() if torch_name}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file to the first element
    stride: tuple[int, ...] | None = None  # in elements; None: the elements lie in a row

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, without gaps."""
        return prod(self.shape) * DTYPES[self.dtype][0] // 8


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Everything a file tells about itself without its weights being read."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


class MappedFile:
    """Views of tensors on one private (copy-on-write) memory map, made when the first view is asked for.

    The map is private, so that writing into a view (fusing a LoRA) changes memory and never the file. A view
    keeps the map alive. Pages that are only read belong to the page cache: a mapped model costs no memory of
    its own.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self._map: mmap.mmap | None = None

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.num_bytes:
                    raise CorruptCheckpointError(
                        f"{self.path} had {self.num_bytes} bytes when it was opened and has {size} now; "
                        "something is still writing to it. Wait until it is complete and load it again."
                    )
                if sys.platform == "linux":
                    # Without NORESERVE the kernel refuses a writable map that is larger than RAM, though the
                    # pages are those of the file. (Python names the flag only from 3.13 on.)
                    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
                    prot = mmap.PROT_READ | mmap.PROT_WRITE
                    self._map = mmap.mmap(file.fileno(), size, flags=flags, prot=prot)
                else:
                    self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        return self._map

    def view(self, stored: StoredTensor) -> Tensor:
        """Return the tensor as a view of the map; nothing is read until its elements are."""
        import torch

        name = DTYPES[stored.dtype][1]
        dtype = getattr(torch, name, None) if name else None
        if not isinstance(dtype, torch.dtype):
            raise UnsupportedModelError(
                f"{self.path} stores weights as {stored.dtype}, which torch {torch.__version__} cannot hold. "
                "Use the bf16, fp16 or fp8 file of this model."
            )
        if prod(stored.shape) == 0:
            return torch.empty(stored.shape, dtype=dtype)
        if stored.stride is None:
            extent = prod(stored.shape)
        else:
            extent = 1 + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
        # A header of odd length gives elements that are not aligned. They are views too, as in the
        # safetensors library: processors of today read them, and a copy of a whole model would not fit in
        # memory.
        flat = torch.frombuffer(self._mapping(), dtype=dtype, count=extent, offset=stored.offset)
        if stored.stride is None:
            return flat.view(stored.shape)
        return flat.as_strided(stored.shape, stored.stride)

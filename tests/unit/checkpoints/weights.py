"""Files for these tests: real headers of published checkpoints over holes instead of weights, and toys."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parents[2] / "data" / "checkpoints"
Shapes = Mapping[str, tuple[int, ...]]

# Sizes of a DiT that no rule about heads fits (96 / 128), as the goldens use them.
TOY_DIT = {
    "dim": 96,
    "in_dim": 16,
    "out_dim": 16,
    "ffn_dim": 160,
    "num_layers": 3,
    "freq_dim": 64,
    "text_dim": 48,
}


@cache
def manifests() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of 56 published checkpoints; fingerprints equal the published ones."""
    packed = gzip.decompress((DATA / "manifests.json.gz").read_bytes())
    return {
        model: {name: tuple(shape) for name, shape in tensors.items()}
        for model, tensors in json.loads(packed).items()
    }


@cache
def expected() -> dict[str, dict[str, Any]]:
    """What each of them is, as its publisher's configuration says."""
    return json.loads((DATA / "expected.json").read_text())


def write_sparse(
    path: Path,
    shapes: Shapes,
    dtype: str = "BF16",
    num_bytes: int = 2,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file of full size whose weights are a hole: reads as zeros, takes no room on the disk."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        size = prod(shape) * num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return write_header(path, raw + b" " * (-len(raw) % 8), end)  # aligned, as the library writes it


def write_header(path: Path, header: object, num_bytes: int) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + num_bytes)
    return path


class _Storage:
    def __init__(self, key: str, numel: int) -> None:
        self.key, self.numel = key, numel


class _Tensor:
    def __init__(self, key: str, shape: tuple[int, ...]) -> None:
        self.key, self.shape = key, shape

    def __reduce__(self) -> tuple[object, ...]:
        stride = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        storage = _Storage(self.key, prod(self.shape))
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _Storage):
            return ("storage", torch.BFloat16Storage, obj.key, "cpu", obj.numel)
        return None


def write_sparse_pth(path: Path, shapes: Shapes) -> Path:
    """A file as torch.save writes it, bfloat16, of full size, whose storages are holes."""
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(
        {name: _Tensor(str(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    )
    entries = [("archive/data.pkl", pickled.getvalue(), len(pickled.getvalue()))]
    entries += [(f"archive/data/{i}", b"", prod(shape) * 2) for i, shape in enumerate(shapes.values())]
    directory = b""
    with path.open("wb") as file:
        for name, content, size in entries:
            offset, raw = file.tell(), name.encode()
            crc = zlib.crc32(content)
            sizes = struct.pack("<HHQQ", 1, 16, size, size)
            file.write(
                struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1, len(raw), 20)
            )
            file.write(raw + sizes + content)
            file.seek(size - len(content), 1)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
            fields = (crc, 2**32 - 1, 2**32 - 1, len(raw), len(extra), 0, 0, 0, 0, 2**32 - 1)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, *fields) + raw + extra
        start = file.tell()
        file.write(directory)
        end = file.tell()
        count = len(entries)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, end - start, start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0))
    return path


def toy_dit(num_heads: int = 3, **sizes: object) -> torch.nn.Module:
    """A tiny WanDiT with random weights."""
    from diffsynth.models.wan.dit import WanDiT

    config = {
        **TOY_DIT,
        "num_heads": num_heads,
        "patch_size": (1, 2, 2),
        "text_len": 512,
        "eps": 1e-6,
        **sizes,
    }
    return WanDiT.from_config(config)

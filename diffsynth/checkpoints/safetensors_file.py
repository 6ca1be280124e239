"""The header of a .safetensors file, read and checked without any library.

Layout: 8 bytes, little-endian N; N bytes of JSON: name -> {dtype, shape, data_offsets}; then the elements,
without holes and without overlaps, up to the end of the file. Source: safetensors README, "Format".
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from diffsynth.checkpoints.mapped import DTYPES, FileHeader, StoredTensor
from diffsynth.errors import CorruptCheckpointError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def read_safetensors_header(path: Path) -> FileHeader:
    """Return names, shapes, dtypes and places of all tensors of ``path``, and its metadata.

    Raises:
        CorruptCheckpointError: when the header does not describe the file: too long, no JSON, unknown dtype,
            tensors that overlap, leave holes or end somewhere else than the file does.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > num_bytes - 8:
            raise CorruptCheckpointError(
                f"{path} is no complete safetensors file: its header should have {length} bytes, the file "
                f"has {num_bytes}. It was cut off, or is another kind of file under this name. Download it "
                "again."
            )
        if length > MAX_HEADER_BYTES:
            raise CorruptCheckpointError(
                f"{path}: the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed."
            )
        raw = file.read(length)
    entries = _parse_json(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    first_byte = 8 + length
    tensors = {name: _stored_tensor(path, name, entry, first_byte) for name, entry in entries.items()}
    _check_places(path, tensors, first_byte, num_bytes)
    return FileHeader(tensors, metadata)


def _parse_json(path: Path, raw: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise CorruptCheckpointError(
                f"{path}: the header names a tensor twice; the file is damaged or made up."
            )
        return content

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(
            f"{path} is no safetensors file: its header is not JSON ({error}). Download it again, or look "
            "what it is."
        ) from None
    if not isinstance(entries, dict):
        raise CorruptCheckpointError(f"{path}: the header is a JSON {type(entries).__name__}, not an object.")
    return entries


def _metadata(path: Path, found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CorruptCheckpointError(f"{path}: __metadata__ of the header must map texts to texts.")
    return found


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stored_tensor(path: Path, name: str, entry: object, first_byte: int) -> StoredTensor:
    dtype, shape, offsets = (
        (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
        if isinstance(entry, dict)
        else (None, None, None)
    )
    if not (isinstance(shape, list) and all(map(_is_size, shape))):
        raise CorruptCheckpointError(
            f"{path}: tensor {name!r} has the shape {shape!r}; sizes must be 0 or more."
        )
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise CorruptCheckpointError(
            f"{path}: tensor {name!r} has data_offsets {offsets!r}; expected [begin, end]."
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptCheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}.")
    expected, given = prod(shape) * DTYPES[dtype][0] // 8, offsets[1] - offsets[0]
    if expected != given:
        raise CorruptCheckpointError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} needs {expected} bytes, the header "
            f"gives it {given}."
        )
    return StoredTensor(dtype, tuple(shape), first_byte + offsets[0])


def _check_places(path: Path, tensors: dict[str, StoredTensor], first_byte: int, num_bytes: int) -> None:
    end = first_byte
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if stored.offset != end:
            fault = "overlaps the tensor before it" if stored.offset < end else "leaves a hole before it"
            raise CorruptCheckpointError(f"{path}: tensor {name!r} {fault}; the file is damaged or made up.")
        end += stored.num_bytes
    if end > num_bytes:
        raise CorruptCheckpointError(
            f"{path} is cut off: its header describes {end} bytes, the file has {num_bytes}. Download it "
            "again."
        )
    if end < num_bytes:
        raise CorruptCheckpointError(
            f"{path} has {num_bytes - end} bytes behind its last tensor that belong to nothing; the file is "
            "damaged."
        )

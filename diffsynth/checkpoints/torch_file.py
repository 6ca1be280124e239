"""The header of a file of torch.save (.pth, .pt, .ckpt, .bin), read without torch and without running it.

Such a file is a zip with uncompressed entries: NAME/data.pkl (a pickle of the dict) and NAME/data/KEY (the
elements of one storage). A pickle is a program. Ours is run by an unpickler that knows only the calls which
put a tensor together, and these calls are stand-ins that note sizes. Any other global ends the reading before
it is looked up.
"""

from __future__ import annotations

import io
import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import IO

from diffsynth.checkpoints.mapped import DTYPES, SPELLING, FileHeader, StoredTensor
from diffsynth.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError

logger = logging.getLogger("diffsynth")

MAX_PICKLE_BYTES = 256 << 20  # the pickle of a 14B model has 0.3 MB
# Keys under which trainers keep the weights, the better first: Self-Forcing and CausVid have an averaged
# generator beside the raw one, and a critic.
WRAPPERS = (
    "state_dict", "module", "model_state", "model", "generator_ema", "generator", "model_ema", "ema", "dit",
    "transformer",
)  # fmt: skip
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "UntypedStorage": "U8",
}
REBUILDERS = {
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
}


class _Inert:
    """What a pickle may hold but never change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise UnsafeCheckpointError(f"a change of {type(self).__name__}")


class _Storage(_Inert):
    __slots__ = ("dtype", "num_bytes", "offset")

    def __init__(self, dtype: str, offset: int, num_bytes: int) -> None:
        self.dtype, self.offset, self.num_bytes = (
            dtype,
            offset,
            num_bytes,
        )  # offset: from the start of the file


class _Tensor(_Inert):
    __slots__ = ("stored",)

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored


class _Dict(dict[object, object]):
    """Stands in for OrderedDict; its attributes (``_metadata`` of a state dict) are of no use here."""

    def __setstate__(self, state: object) -> None:
        return None


class _Global(_Inert):
    """A name that the pickle may mention: a call that notes sizes, a storage type, or a dtype."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: object) -> object:
        if self.name == "OrderedDict":
            return _Dict(*args)  # type: ignore[arg-type]
        if self.name.startswith("_rebuild_parameter"):
            return args[0]
        if self.name == "Size":
            return tuple(args[0])  # type: ignore[arg-type]
        if self.name in REBUILDERS:
            return _rebuild(*args)
        raise UnsafeCheckpointError(f"a call of {self.name}")


def _rebuild(storage: object, start: object, shape: object, stride: object, *rest: object) -> _Tensor:
    # rest: requires_grad, hooks[, dtype (version 3), metadata]
    sizes = (start, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in sizes):
        raise CorruptCheckpointError(
            f"a tensor of shape {shape!r} and stride {stride!r}, first element {start!r}"
        )
    assert isinstance(shape, tuple) and isinstance(stride, tuple) and isinstance(start, int)
    named = next((item.name for item in rest if isinstance(item, _Global)), None)
    dtype = storage.dtype if named is None else SPELLING.get(named, "")
    if not dtype or len(shape) != len(stride):
        raise CorruptCheckpointError(f"a tensor of shape {shape}, stride {stride} and dtype {named}")
    width = DTYPES[dtype][0] // 8
    extent = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if (start + extent) * width > storage.num_bytes:
        raise CorruptCheckpointError(
            f"a tensor of shape {shape} that ends outside its {storage.num_bytes} bytes"
        )
    in_a_row = all(
        n == 1 or step == prod(shape[i + 1 :]) for i, (n, step) in enumerate(zip(shape, stride, strict=True))
    )
    is_plain = in_a_row or extent == 0
    return _Tensor(StoredTensor(dtype, shape, storage.offset + start * width, None if is_plain else stride))


class _HeaderUnpickler(pickle.Unpickler):
    """Runs data.pkl with nothing in reach but `_Global`."""

    def __init__(self, file: IO[bytes], places: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(file)
        self._places = places

    def find_class(self, module: str, name: str) -> _Global:
        allowed = (
            (module == "torch._utils" and name in REBUILDERS)
            or (module in ("torch", "torch.storage") and name in STORAGES)
            or (module == "torch" and (name in SPELLING or name == "Size"))
            or (module == "collections" and name == "OrderedDict")
        )
        if not allowed:
            raise UnsafeCheckpointError(f"the global {module}.{name}")
        return _Global(name)

    def persistent_load(self, pid: object) -> _Storage:
        if not (
            isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Global)
        ):
            raise CorruptCheckpointError(f"a reference to {pid!r}; expected a storage")
        dtype, place = STORAGES.get(pid[1].name), self._places.get(str(pid[2]))
        if dtype is None or place is None:
            raise CorruptCheckpointError(f"the storage {pid[2]!r}, which is not in the file")
        return _Storage(dtype, *place)


def read_torch_header(path: Path) -> FileHeader:
    """Return names, shapes, dtypes and places of all tensors of ``path``; nothing in it is run.

    Raises:
        UnsafeCheckpointError: when the pickle names a global that is no part of a tensor.
        CorruptCheckpointError: when it is no complete zip of torch.save, or a tensor lies outside its
            storage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled, places = _entries(path, archive)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive makes zipfile fail in a dozen ways
        raise CorruptCheckpointError(
            f"{path} is no complete torch file ({error}). It was cut off while it was copied or downloaded; "
            "download it again."
        ) from None
    try:
        content = _HeaderUnpickler(io.BytesIO(pickled), places).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f"{path} asks for {error}; a file of weights needs only tensors, so nothing of it was run. If "
            "you trust its maker, load it with torch yourself and save its tensors with "
            "safetensors.torch.save_file()."
        ) from None
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{path} describes {error}; the file is damaged or made up.") from None
    except Exception as error:  # a damaged pickle may fail in any way; none of them has run anything
        raise CorruptCheckpointError(f"{path}: its data.pkl cannot be read ({error!r}).") from None
    return FileHeader(_state_dict(path, content), _metadata(content))


def _entries(path: Path, archive: zipfile.ZipFile) -> tuple[bytes, dict[str, tuple[int, int]]]:
    pickles = [info for info in archive.infolist() if info.filename.split("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise CorruptCheckpointError(
            f"{path} is a zip archive but not one of torch.save (it has {len(pickles)} data.pkl). If it is a "
            "packed folder, unpack it and load the weights inside."
        )
    root = pickles[0].filename.removesuffix("data.pkl")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise CorruptCheckpointError(
            f"{path}: data.pkl has {pickles[0].file_size} bytes; it should have a few MB."
        )
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise CorruptCheckpointError(
            f"{path} was written on a big-endian machine; save it again on this one."
        )
    num_bytes, places = path.stat().st_size, {}
    for info in archive.infolist():
        if not info.filename.startswith(f"{root}data/"):
            continue
        if info.compress_type != zipfile.ZIP_STORED:
            raise CorruptCheckpointError(
                f"{path}: the entry {info.filename} is compressed, torch.save never does that. Unpack the "
                "archive and save the weights again."
            )
        places[info.filename.removeprefix(f"{root}data/")] = (
            _data_offset(path, archive, info, num_bytes),
            info.file_size,
        )
    return archive.read(pickles[0]), places


def _data_offset(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, num_bytes: int) -> int:
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    header = archive.fp.read(
        30
    )  # local file header: lengths of the name and of the extra field at bytes 26 and 28
    offset = (
        info.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    if header[:4] != b"PK\x03\x04" or offset + info.file_size > num_bytes:
        raise CorruptCheckpointError(
            f"{path}: the entry {info.filename} lies outside the file; download it again."
        )
    return offset


def _metadata(content: object) -> dict[str, str]:
    """Texts beside the tensors, as `training.checkpoints` writes them and a safetensors header has them."""
    told = content.get("metadata") if isinstance(content, dict) else None
    items = told.items() if isinstance(told, dict) else ()
    return {name: text for name, text in items if isinstance(name, str) and isinstance(text, str)}


def _state_dict(path: Path, content: object) -> dict[str, StoredTensor]:
    for _ in range(4):  # {"module": {"state_dict": {...}}} has been seen; deeper has not
        if not isinstance(content, dict):
            break
        named = [key for key in WRAPPERS if _holds_tensors(content.get(key))]
        if named:
            _tell_choice(path, named)
            content = content[named[0]]
            continue
        tensors = {name: value.stored for name, value in content.items() if isinstance(value, _Tensor)}
        if not all(isinstance(name, str) for name in tensors):
            raise CorruptCheckpointError(f"{path} names its tensors with something else than texts.")
        if tensors:
            return tensors
        inside = [key for key, value in content.items() if _holds_tensors(value)]
        if len(inside) != 1:
            found = f", and several others: {', '.join(map(str, inside[:5]))}" if inside else ""
            raise CorruptCheckpointError(
                f"{path} holds no dict of tensors, not even under {', '.join(WRAPPERS)}{found}. Save the "
                "weights alone: torch.save(model.state_dict(), FILE)."
            )
        content = content[inside[0]]  # under a name that nobody else uses
    raise CorruptCheckpointError(
        f"{path} holds no dict of tensors, not even under {', '.join(WRAPPERS)}. Save the weights alone: "
        "torch.save(model.state_dict(), FILE)."
    )


def _holds_tensors(value: object, depth: int = 4) -> bool:
    """Whether a dict has tensors, itself or under one of the usual keys; a dict may hold itself."""
    if not isinstance(value, dict) or not depth:
        return False
    if any(isinstance(one, _Tensor) for one in value.values()):
        return True
    return any(_holds_tensors(value.get(key), depth - 1) for key in WRAPPERS)


def _tell_choice(path: Path, named: Sequence[str]) -> None:
    if named[0] in ("generator_ema", "generator") and named[1:]:
        logger.info(
            "%s: the weights under %r are read, not those under %s.", path, named[0], ", ".join(named[1:])
        )

"""The tensors of a file as a dict, for scripts that look into it. Nothing is unpickled but tensors."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.checkpoints.files import PathLike, as_path
from diffsynth.checkpoints.mapped import MappedFile
from diffsynth.checkpoints.open_file import not_found, read_header
from diffsynth.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError

if TYPE_CHECKING:
    import torch

_TORCH_STARTS = (b"PK\x03\x04", b"\x80")  # a zip, or a bare pickle of before torch 1.6


def load_state_dict(
    file_path: PathLike | Sequence[PathLike],
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Read a file, or several whose tensors are put together.

    Args:
        file_path: safetensors, or what ``torch.save`` wrote; told by the content, not by the name.
        torch_dtype: of the tensors in the dict; None keeps that of the file.
        device: of the tensors.

    Returns:
        The tensors by their names in the file. What a trainer wrapped (``{"state_dict": ...}``) stays so.

    Raises:
        CheckpointNotFoundError: when there is no such file.
        CorruptCheckpointError: when it is cut off, or no file of weights.
        UnsafeCheckpointError: when it is a pickle that asks for more than tensors and plain values.
    """
    paths = [file_path] if isinstance(file_path, (str, Path)) else list(file_path)
    state: dict[str, Any] = {}
    for path in map(as_path, paths):
        state.update(_read(path, device))
    if torch_dtype is None:
        return state
    return {name: _converted(value, torch_dtype) for name, value in state.items()}


def _read(path: Path, device: str | torch.device) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointNotFoundError(not_found(path))
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] != b"{" and start.startswith(_TORCH_STARTS):  # a length before a header looks like anything
        return _read_torch(path, device)
    header, file_map = read_header(path), MappedFile(path, path.stat().st_size)
    return {name: file_map.view(stored).to(device) for name, stored in header.tensors.items()}


def _read_torch(path: Path, device: str | torch.device) -> dict[str, Any]:
    import torch

    try:
        with path.open("rb") as file:  # of a name torch would tell the kind
            content = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path} asks for more than tensors and plain values, so it was not read: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None
    except Exception as error:  # a damaged file makes torch fail in a dozen ways
        raise CorruptCheckpointError(
            f"{path} is no complete torch file ({type(error).__name__}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    return content


def _converted(value: object, dtype: torch.dtype) -> object:
    import torch

    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_number and isinstance(value, torch.Tensor) else value

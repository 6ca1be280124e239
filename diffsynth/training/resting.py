"""Of several experts one answers at a time; the frozen weights of the others rest on the host or on disk.

Frozen weights never change, so that nothing is ever copied back: what came to the device is dropped, and the
tensors stand for the memory again in which they rest. What trains stays on the device, with its optimizer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffsynth.errors import PinnedMemoryError
from diffsynth.portable import is_alive
from diffsynth.video.paths import disk_errors
from diffsynth.vram_management.flat import resting_tensors
from diffsynth.vram_management.host_memory import is_locked, lock_tensors

logger = logging.getLogger("diffsynth")

Place = Literal["device", "ram", "disk"]
MAPS = Path("/proc/self/maps")  # of Linux: which memory is that of files
ALIGNMENT = 64  # bytes, of a tensor in a spilled file


class Resting:
    """See this module's legend.

    Args:
        experts: the networks of each, after what trains was chosen.
        device: where they compute.
        place: "ram" (page-locked for a GPU) or "disk": the mapped files that the weights were loaded from,
            and one more in ``folder`` for those that were converted as they were loaded.
        folder: of that file; it needs no name any more once it is mapped, and so ends with the process.
    """

    def __init__(
        self, experts: Sequence[Sequence[nn.Module]], device: torch.device, place: Place, folder: Path
    ) -> None:
        self._device = device
        tensors = [[t for network in some for _, t in resting_tensors(network)] for some in experts]
        if place == "disk":
            _to_disk([tensor for some in tensors for tensor in some], folder)
        elif device.type == "cuda":
            _lock([tensor for some in tensors for tensor in some], device)
        self._experts = [[(tensor, tensor.data) for tensor in some] for some in tensors]

    def bring_in(self, number: int | None) -> None:
        """Let one expert be on the device and all others rest; None: all rest."""
        for other, pairs in enumerate(self._experts):
            if other != number:
                for tensor, resting in pairs:
                    tensor.data = resting
        for tensor, resting in self._experts[number] if number is not None else ():
            if tensor.device != self._device:
                tensor.data = resting.to(self._device, non_blocking=True)


def _lock(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Page-lock them; where the system allows no more, the rest stays as it is."""
    try:
        lock_tensors(tensors, device)
    except PinnedMemoryError as error:
        logger.warning(
            "%s %d of %d resting tensors are page-locked: the others travel more slowly. "
            "memory.idle_expert: disk takes no memory at all.",
            error, sum(map(is_locked, tensors)), len(tensors),
        )  # fmt: skip


def _to_disk(tensors: Sequence[Tensor], folder: Path) -> None:
    """Let tensors that are not in a mapped file be in one."""
    mapped = _ranges_of_files()
    loose = [t for t in tensors if t.numel() and not any(a <= t.data_ptr() < b for a, b in mapped)]
    starts, size = [], 0
    for tensor in loose:
        starts.append(size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    if not loose:
        return
    path = folder / f".resting-{os.getpid()}"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        try:
            with path.open("wb") as file:
                for start, tensor in zip(starts, loose, strict=True):
                    file.seek(start)
                    file.write(tensor.data.contiguous().view(-1).view(torch.uint8).numpy().data)
                file.truncate(size)
            whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        finally:
            with suppress(PermissionError):  # Windows keeps what is mapped; a later run removes it
                path.unlink(missing_ok=True)
    for start, tensor in zip(starts, loose, strict=True):
        num_bytes = tensor.numel() * tensor.element_size()
        tensor.data = whole[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
    logger.info("%.2f GiB of resting weights went to disk, in %s.", size / 2**30, folder)


def _remove_leftovers(folder: Path) -> None:
    """Files of processes that have ended without removing theirs."""
    for file in folder.glob(".resting-*"):
        process = file.name.rpartition("-")[2]
        if process.isdecimal() and not is_alive(int(process)):
            with suppress(OSError):
                file.unlink()


def _ranges_of_files() -> list[tuple[int, int]]:
    """Addresses at which files are mapped; none where the system does not tell."""
    if not MAPS.is_file():
        return []
    found = []
    for line in MAPS.read_text().splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/") and parts[4] != "0":
            first, _, last = parts[0].partition("-")
            found.append((int(first, 16), int(last, 16)))
    return found

"""What a test asks of the simulated runtime that it runs on."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

GIB = 1 << 30
DEVICE_BYTES = 139 * GIB
_runtime = ctypes.CDLL(None)  # preloaded: its functions are those of the process


@dataclass(frozen=True)
class Counts:
    """Since the process began; in the order of the runtime's counters."""

    launches: int  # kernels and products
    products: int  # of cuBLAS
    syncs: int  # the host waited for the device
    locks: int  # cudaHostRegister
    unlocks: int
    copies: int  # between host and device
    copied_bytes: int
    pageable_bytes: int  # of these, from or to memory that is not locked

    def __sub__(self, other: Counts) -> Counts:
        names = [field.name for field in fields(self)]
        return Counts(*(getattr(self, name) - getattr(other, name) for name in names))


def counts() -> Counts:
    counter = _runtime.fake_cuda_counter
    counter.restype = ctypes.c_long
    return Counts(*(counter(i) for i in range(len(fields(Counts)))))


def locked_bytes() -> int:
    locked = _runtime.fake_cuda_locked_bytes
    locked.restype = ctypes.c_long
    return int(locked())


def has_context(device: int) -> bool:
    """Whether anything of this test has touched this GPU."""
    return bool(_runtime.fake_cuda_has_context(device))


def device_memory(num_bytes: int) -> None:
    """The size of each GPU."""
    _runtime.fake_cuda_set_device_bytes(ctypes.c_long(num_bytes))


def lockable_memory(num_bytes: int | None) -> None:
    """Host memory that may be locked beside what is; None: any."""
    limit = 1 << 60 if num_bytes is None else locked_bytes() + num_bytes
    _runtime.fake_cuda_set_lockable_bytes(ctypes.c_long(limit))


def delays(compute_us: int = 0, copies_us: int = 0) -> None:
    """Operations of a GPU's own stream, and of all other streams, begin up to so much late."""
    _runtime.fake_cuda_set_delays(ctypes.c_long(compute_us), ctypes.c_long(copies_us))


def copies_move_bytes(do_they: bool) -> None:
    """Without: full-size networks in little memory. Copies of a few numbers are real all the same."""
    _runtime.fake_cuda_set_copies(int(do_they))


def reset() -> None:
    """As a process starts."""
    device_memory(DEVICE_BYTES)
    lockable_memory(None)
    delays()
    copies_move_bytes(True)
    _runtime.fake_cuda_forget_contexts()


@contextmanager
def logged(path: Path) -> Iterator[list[list[str]]]:
    """Rows of (what, name, stream, bytes, more), filled at the end."""
    rows: list[list[str]] = []
    _runtime.fake_cuda_log(str(path).encode())
    try:
        yield rows
    finally:
        _runtime.fake_cuda_log(None)
        rows += [line.split("\t") for line in path.read_text().splitlines()]

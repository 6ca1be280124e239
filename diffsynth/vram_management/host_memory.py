"""Host memory that is page-locked for a GPU, which reads it while the host goes on.

Memory is locked once and stays so for as long as a tensor lies in it: whoever stops streaming and begins
again finds its blocks locked. It is registered rather than allocated by torch, whose pinned allocator rounds
up to powers of two: a block of 703 MB would cost 1024. Where the system has huge pages it is asked for them:
locking goes through every page, and 28 GB have seven million small ones.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from diffsynth.errors import PinnedMemoryError

ALIGNMENT = 256  # bytes, of a tensor beside others; what copies like
RUN_BYTES = 512 << 20  # tensors that are locked together
HUGE_PAGE = 2 << 20
MEMINFO = Path("/proc/meminfo")  # of Linux
SHARE_OF_FREE = 0.5  # of what is free on the host: more is not locked without being asked for


class _Pages(mmap.mmap):
    """Memory that unlocks itself before it goes; tensors in it hold it."""

    _address, _gpu = 0, torch.device("cpu")

    def lock(self, address: int, gpu: torch.device) -> None:
        with torch.cuda.device(gpu):  # else the call would open a context on the first GPU
            status = int(_cudart().cudaHostRegister(address, len(self), 0))
        if status != 0:
            _forget_error(gpu)
            raise PinnedMemoryError(
                f"The system did not lock {len(self) / 2**20:.0f} MiB of memory for the GPU (CUDA error "
                f"{status}). Locked memory cannot be swapped, and systems allow a part of it only: free "
                "memory, or under WSL raise memory= in .wslconfig."
            )
        self._address, self._gpu = address, gpu
        _locked[address] = self

    def unlock(self) -> None:
        address, self._address = self._address, 0
        _locked.pop(address, None)
        # At the end of the process the driver takes care of it, and torch may be gone.
        if address and not sys.is_finalizing():
            with torch.cuda.device(self._gpu):
                torch.cuda.synchronize()  # copies under way read it
                _cudart().cudaHostUnregister(address)

    def __del__(self) -> None:
        self.unlock()


_locked: WeakValueDictionary[int, _Pages] = WeakValueDictionary()  # by the address at which they begin


@contextmanager
def lasting_memory() -> Iterator[None]:
    """Make tensors that outlive a call, whatever mode the caller is in.

    A tensor that is made in ``torch.inference_mode()`` may be written to in that mode only, and the mode is
    one of the thread: neither a thread that copies nor the next call could fill it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def locked_buffer(num_bytes: int, gpu: torch.device) -> Tensor:
    """Return page-locked memory, (num_bytes,) uint8; it is unlocked when the last tensor in it is gone.

    Args:
        num_bytes: its size.
        gpu: that reads it.

    Raises:
        PinnedMemoryError: when the system does not lock that much.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = _pages(num_bytes)
    with lasting_memory():
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
    pages.lock(buffer.data_ptr(), gpu)
    return buffer


def is_locked(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory of `locked_buffer`."""
    return tensor.untyped_storage().data_ptr() in _locked


def unlock_buffer(buffer: Tensor) -> None:
    """Let memory of `locked_buffer` be plain; tensors in it stay."""
    pages = _locked.get(buffer.untyped_storage().data_ptr())
    if pages is not None:
        pages.unlock()


def lock_tensors(tensors: Sequence[Tensor], gpu: torch.device) -> None:
    """Move tensors of the host into page-locked memory; the objects, and all who hold them, stay.

    Raises:
        PinnedMemoryError: when the system locks no more; tensors that came before are locked.
    """
    for run in _runs(t for t in tensors if t.device.type == "cpu" and t.is_contiguous() and not is_locked(t)):
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in run]
        buffer = locked_buffer(sum(sizes), gpu)
        for tensor, start in zip(run, accumulate(sizes, initial=0), strict=False):
            place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.data)
            tensor.data = place


def host_has_room(num_bytes: int) -> bool:
    """Whether so much may be locked without being asked for; False where the system does not tell."""
    if not MEMINFO.is_file():
        return False
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    free_kib = next((int(words[1]) for words in lines if words[0] == "MemAvailable:"), 0)
    return num_bytes <= free_kib * 1024 * SHARE_OF_FREE


def _pages(num_bytes: int) -> _Pages:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return _Pages(-1, num_bytes)
    memory = _Pages(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _runs(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    runs: list[list[Tensor]] = []
    size = RUN_BYTES
    for tensor in tensors:
        if size + tensor.nbytes > RUN_BYTES:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += tensor.nbytes
    return runs


def _forget_error(gpu: torch.device) -> None:
    """Clear the error that a refused call leaves behind: the next kernel would report it as its own."""
    with suppress(RuntimeError):
        torch.zeros(1, device=gpu).add_(1)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]

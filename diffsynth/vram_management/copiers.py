"""Who carries a block's bytes to the device while another block computes, and how one waits for the other.

Bytes are carried in the order in which they were asked for. A `Mark` is a point in the order of the compute;
a `Transfer` is a carriage that can be waited for. On a GPU both are events: the host never waits for the
device. The CPU can play the device too, with a worker thread as its copy engine: same order, same overlap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.errors import PinnedMemoryError
from diffsynth.ops.devices import on_stream
from diffsynth.vram_management.host_memory import lasting_memory, locked_buffer

logger = logging.getLogger("diffsynth")

Mark = Callable[[], None]  # make the copy engine wait until the compute has passed this point


class Source(Protocol):
    """Where the bytes of a block rest."""

    def read_into(self, target: Tensor, start: int, stop: int) -> None:
        """Copy bytes ``start:stop`` of the block to the same place in ``target``, (n,) uint8."""


@dataclass(frozen=True, slots=True)
class FlatSource:
    """One flat buffer, pinned where a GPU reads it."""

    buffer: Tensor  # (n,) uint8

    def read_into(self, target: Tensor, start: int, stop: int) -> None:
        target[start:stop].copy_(self.buffer[start:stop], non_blocking=True)


@dataclass(frozen=True, slots=True)
class ScatteredSource:
    """Tensors that lie anywhere, usually in a mapped file, and the place of each in the block."""

    pieces: Sequence[tuple[int, Tensor]]  # byte offset, contiguous (n,) uint8

    def read_into(self, target: Tensor, start: int, stop: int) -> None:
        for offset, piece in self.pieces:
            if start <= offset and offset + piece.numel() <= stop:
                target[offset : offset + piece.numel()].copy_(piece)


class Transfer(Protocol):
    """Bytes on their way."""

    def wait(self) -> None:
        """Let the compute go on only when they have arrived; raises what went wrong on the way."""


class Copier(Protocol):
    """A copy engine."""

    def mark(self) -> Mark:
        """Return the point that the compute has reached."""

    def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        """Carry bytes ``start:stop`` of ``source`` into ``target`` once ``free`` is passed; returns at once.

        Args:
            target: (n,) uint8 on the device.
            source: where the bytes rest.
            start: first byte.
            stop: byte behind the last.
            free: the last use of ``target``.
        """

    def close(self) -> None:
        """Wait for what is on its way and end."""


@dataclass(frozen=True, slots=True)
class _FutureTransfer:
    future: Future[None]

    def wait(self) -> None:
        self.future.result()


class ThreadCopier:
    """A worker thread carries, for the CPU as the device: its compute has passed a mark when it is made."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="diffsynth-copy")

    def mark(self) -> Mark:
        return _nothing

    def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        return _FutureTransfer(self._worker.submit(source.read_into, target, start, stop))

    def close(self) -> None:
        self._worker.shutdown()


@dataclass(frozen=True, slots=True)
class _EventTransfer:
    event: torch.cuda.Event

    def wait(self) -> None:
        torch.cuda.current_stream(self.event.device).wait_event(self.event)


class StreamCopier:
    """A side stream carries from pinned memory: one asynchronous copy a block."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device

    def mark(self) -> Mark:
        passed = torch.cuda.current_stream(self._device).record_event()
        return lambda: self._stream.wait_event(passed)

    def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        free()
        with on_stream(self._stream):
            source.read_into(target, start, stop)
            return _EventTransfer(self._stream.record_event())

    def close(self) -> None:
        # The slots go back to the allocator of the compute's stream, which knows nothing of this one.
        self._stream.synchronize()


class RingCopier:
    """A reader thread fills a small ring of staging buffers, from which another copier carries.

    For blocks that rest in a mapped file: the host holds the ring alone, whatever the size of the model.

    Args:
        carrier: carries from the ring to the device.
        block_bytes: of the largest block.
        num_buffers: of the ring; two let reading and carrying overlap.
        gpu: that reads the ring; None for the CPU as the device.
    """

    def __init__(
        self, carrier: Copier, block_bytes: int, *, num_buffers: int = 2, gpu: torch.device | None
    ) -> None:
        self._carrier = carrier
        try:
            self._ring = [host_buffer(block_bytes, gpu) for _ in range(num_buffers)]
        except PinnedMemoryError as error:
            logger.warning("%s The ring is plain memory: copies take longer.", error)
            self._ring = [host_buffer(block_bytes, None) for _ in range(num_buffers)]
        self._busy: list[Callable[[], None]] = [_nothing] * num_buffers
        self._next = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="diffsynth-read")

    def mark(self) -> Mark:
        return self._carrier.mark()

    def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        return _RingTransfer(self._reader.submit(self._carry, target, source, start, stop, free))

    def close(self) -> None:
        self._reader.shutdown()
        self._carrier.close()

    def _carry(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        index, self._next = self._next, (self._next + 1) % len(self._ring)
        self._busy[index]()
        staged = self._ring[index].buffer
        source.read_into(staged, start, stop)
        sent = self._carrier.fetch(target, self._ring[index], start, stop, free)
        self._busy[index] = sent.event.synchronize if isinstance(sent, _EventTransfer) else sent.wait
        return sent


@dataclass(frozen=True, slots=True)
class _RingTransfer:
    future: Future[Transfer]

    def wait(self) -> None:
        self.future.result().wait()


def host_buffer(num_bytes: int, gpu: torch.device | None) -> FlatSource:
    """Return a flat buffer of host memory.

    Args:
        num_bytes: its size.
        gpu: that reads it, for which its pages are locked; None for plain memory.

    Raises:
        PinnedMemoryError: when the system does not lock that much.
    """
    if gpu is not None:
        return FlatSource(locked_buffer(num_bytes, gpu))
    with lasting_memory():
        return FlatSource(torch.empty(num_bytes, dtype=torch.uint8))


def _nothing() -> None:
    pass

"""Inputs of blocks that wait on the host for the backward pass.

Letters: u the bytes of one stream of tokens. On a GPU the copies run on a stream of their own: an input goes
out while the next blocks compute, and comes back while the block behind is differentiated. The device holds
three or four of them (4 u) instead of one for each block. The last ones are still there when the backward
pass begins, and are not copied again.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from diffsynth.errors import PinnedMemoryError
from diffsynth.ops.devices import on_stream
from diffsynth.vram_management.copiers import FlatSource, host_buffer

SMALLEST_BYTES = 64 << 10  # smaller tensors stay where they are
NUM_LEAVING = 2  # inputs whose copies may be under way


@dataclass
class OffloadCounts:
    """What was carried, for tests and reports."""

    out: int = 0
    back: int = 0
    host_bytes: int = 0  # of all buffers


class _Away:
    """A tensor that is on the host, or on its way there or back."""

    def __init__(self, tensor: Tensor, source: FlatSource, pool: _Pool) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.here: Tensor | None = None  # on the device all the same
        self.arrived: torch.cuda.Event | None = None
        self.before: weakref.ref[_Away] | None = None  # the one that left before, and is needed after this
        self._source: FlatSource | None = source
        self._pool = pool

    @property
    def host(self) -> Tensor:
        """Its numbers on the host."""
        assert self._source is not None, "taken back already"
        return self._source.buffer.view(self.dtype).view(self.shape)

    def free(self) -> None:
        """Give the buffer back, for the next one."""
        if self._source is not None:
            self._pool.free.setdefault(self._source.buffer.numel(), []).append(self._source)
            self._source = None

    def __del__(self) -> None:
        self.free()  # no backward pass came


@dataclass
class _Pool:
    """Host buffers by their size, used again in every step."""

    free: dict[int, list[FlatSource]] = field(default_factory=dict)
    made: list[FlatSource] = field(default_factory=list)

    def take(self, num_bytes: int, gpu: torch.device | None) -> FlatSource:
        waiting = self.free.get(num_bytes)
        if waiting:
            return waiting.pop()
        try:
            source = host_buffer(num_bytes, gpu)
        except PinnedMemoryError as error:
            raise PinnedMemoryError(
                f"{error} Or train without memory.offload: inputs of blocks then stay on the GPU."
            ) from error
        self.made.append(source)
        return source


class CheckpointOffload:
    """Carries the inputs of blocks to the host and back; one for a training run.

    Raises:
        PinnedMemoryError: in use, when the system does not lock as much host memory as the inputs take.
    """

    def __init__(self) -> None:
        self.counts = OffloadCounts()
        self._pool = _Pool()
        self._leaving: deque[tuple[_Away, torch.cuda.Event]] = deque()
        self._last: weakref.ref[_Away] | None = None
        self._stream: torch.cuda.Stream | None = None

    def hooks(self) -> saved_tensors_hooks:
        """While this is entered, tensors that autograd keeps go to the host."""
        return saved_tensors_hooks(self._take_away, self._bring_back)

    def close(self) -> None:
        """Let the host's memory go; no backward pass is under way."""
        if self._stream is not None:
            self._stream.synchronize()
        self._leaving.clear()
        self._pool.free.clear()
        self._pool.made.clear()

    def _take_away(self, tensor: Tensor) -> Tensor | _Away:
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes < SMALLEST_BYTES:
            return tensor
        tensor = tensor.detach().contiguous()
        is_cuda = tensor.device.type == "cuda"
        away = _Away(tensor, self._pool.take(num_bytes, tensor.device if is_cuda else None), self._pool)
        away.before, self._last = self._last, weakref.ref(away)
        self.counts.out += 1
        self.counts.host_bytes = sum(source.buffer.numel() for source in self._pool.made)
        if not is_cuda:
            away.host.copy_(tensor)
            return away
        compute, side = torch.cuda.current_stream(tensor.device), self._side(tensor.device)
        side.wait_event(compute.record_event())
        with on_stream(side):
            away.host.copy_(tensor, non_blocking=True)
        # Held until its copy is done: then its memory is free for the compute, in the compute's own order.
        away.here = tensor
        self._leaving.append((away, side.record_event()))
        if len(self._leaving) > NUM_LEAVING:
            gone, left = self._leaving.popleft()
            compute.wait_event(left)
            gone.here = None
        return away

    def _bring_back(self, packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._fetch(packed)
        if packed.arrived is not None:
            torch.cuda.current_stream(packed.device).wait_event(packed.arrived)
        tensor = packed.here
        assert tensor is not None
        before = None if packed.before is None else packed.before()
        if before is not None and packed.device.type == "cuda":
            self._fetch(before)
        packed.here = None
        packed.free()
        self._leaving = deque(item for item in self._leaving if item[0] is not packed)
        return tensor

    def _fetch(self, away: _Away) -> None:
        """Send a tensor on its way back, unless it is here or coming."""
        if away.here is not None:
            return
        self.counts.back += 1
        away.here = torch.empty(away.shape, dtype=away.dtype, device=away.device)
        if away.device.type != "cuda":
            away.here.copy_(away.host)
            return
        side = self._side(away.device)
        # The memory may have been let go by kernels that still run.
        side.wait_event(torch.cuda.current_stream(away.device).record_event())
        with on_stream(side):
            away.here.copy_(away.host, non_blocking=True)
        away.arrived = side.record_event()

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream

"""Blocks that rest in host memory and come to the device just before their turn.

A few slots of the size of a block lie ready on the device. While one block computes in its slot, the next
ones are on their way into the others; behind the last block of a pass come the first of the next. Nothing is
copied back: the host's copy never changes, a slot is simply written over.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError, MovedModelError, PinnedMemoryError
from diffsynth.vram_management.copiers import (
    Copier,
    FlatSource,
    Mark,
    RingCopier,
    Source,
    StreamCopier,
    ThreadCopier,
    Transfer,
    host_buffer,
    release_buffer,
)
from diffsynth.vram_management.flat import FlatLayout, bind

Host = Literal["pinned", "ring", "pageable"]


@dataclass
class StreamCounts:
    """What a stream has done, for tests and reports."""

    copies: int = 0
    bytes: int = 0
    slots_made: int = 0


@dataclass
class _Streamed:
    """A block that travels."""

    module: nn.Module
    layout: FlatLayout
    source: Source
    resting: list[Tensor]  # what its tensors stand for between two turns
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by slot


@dataclass
class _Slot:
    """Room for one block on the device."""

    buffer: Tensor
    free: Mark
    block: int | None = None
    num_bytes: int = 0  # of the block that are here or on their way
    transfers: list[Transfer] = field(default_factory=list)


def _unlock(rested: dict[int, _Streamed]) -> None:
    for one in rested.values():
        if isinstance(one.source, FlatSource):
            release_buffer(one.source)


class BlockStream:
    """Visits the blocks of one network, most of which rest on the host; see `Visit`.

    Args:
        blocks: of the network, in order.
        device: where they compute.
        resident: indices of the blocks that stay on the device.
        num_slots: blocks that have room on the device besides; 2 suffice where blocks take equally long.
        host: "pinned" copies the streamed blocks into flat pinned buffers, "pageable" into flat plain ones
            (the CPU as the device), "ring" leaves them where they are and reads through two small buffers.
        copier: carries the bytes; None: by device and host.

    Raises:
        PinnedMemoryError: when the system does not lock the memory for "pinned".
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        device: torch.device,
        resident: Iterable[int] = (),
        num_slots: int = 2,
        host: Host = "pinned",
        copier: Copier | None = None,
    ) -> None:
        if num_slots < 2:
            raise ArgumentError(
                f"num_slots is {num_slots}; a block travels while another computes: give 2 or 3."
            )
        self.counts, self.host = StreamCounts(), host
        self._device, self._given_copier, self._blocks = device, copier, list(blocks)
        self._rested: dict[int, _Streamed] = {}  # every block that was streamed once
        # Locked pages must be unlocked before their memory goes, also when nobody calls `close`.
        self._unlock = weakref.finalize(self, _unlock, self._rested)
        self._unlock.atexit = False  # the process takes them along
        self._streamed: dict[int, _Streamed] = {}
        self._resident: list[nn.Module] = []
        self._num_slots = num_slots
        self._slots: list[_Slot] = []
        self._copier: Copier | None = None
        self._residing: list[tuple[Tensor, Tensor]] = []
        self._taken: tuple[_Streamed, _Slot] | None = None
        self._walk = 0
        self.arrange(resident, num_slots)

    def arrange(self, resident: Iterable[int], num_slots: int) -> None:
        """Choose anew which blocks stay on the device; see the class. Takes effect at the next start.

        Raises:
            PinnedMemoryError: when the system does not lock the memory for "pinned".
        """
        self.stop()
        stays = set(resident)
        try:
            for index, block in enumerate(self._blocks):
                if index not in stays and index not in self._rested:
                    self._rested[index] = self._lay_to_rest(block)
        except PinnedMemoryError:
            self.close()
            raise
        self._resident = [block for index, block in enumerate(self._blocks) if index in stays]
        self._streamed = {i: self._rested[i] for i in range(len(self._blocks)) if i not in stays}
        self._order, self._num_slots = list(self._streamed), num_slots

    @property
    def slot_bytes(self) -> int:
        """Size of one slot."""
        return max((one.layout.num_bytes for one in self._streamed.values()), default=0)

    def start(self) -> None:
        """Make the slots, bring the resident blocks, send the first blocks on their way."""
        if self._copier is not None:
            return
        self._check_not_moved()
        self._copier = self._given_copier or self._new_copier()
        for block in self._resident:
            for tensor in (*block.parameters(), *block.buffers()):
                self._residing.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self._device)
        for _ in range(min(self._num_slots, len(self._order))):
            buffer = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self._device)
            self._slots.append(_Slot(buffer, self._copier.mark()))
            self.counts.slots_made += 1
        self._fetch_ahead(0, has_keys=False)

    def stop(self) -> None:
        """Give the device's memory back; the blocks stand for their resting weights again."""
        if self._copier is None:
            return
        self._let_go()
        self._copier.close()
        self._copier = None
        for tensor, resting in self._residing:
            tensor.data = resting
        self._residing.clear()
        self._slots.clear()
        for one in self._streamed.values():
            one.views.clear()

    def close(self) -> None:
        """Stop, and unlock the host's memory; the blocks keep their weights in it."""
        self.stop()
        _unlock(self._rested)

    def __call__(self, blocks: Iterable[nn.Module], *, has_keys: bool = False) -> Iterator[nn.Module]:
        """Yield the blocks in order, each with its weights on the device until the next one is asked for."""
        self.start()
        self._let_go()
        self._walk += 1
        walk, position = self._walk, 0
        self._fetch_ahead(position, has_keys=has_keys)
        for index, block in enumerate(blocks):
            if index not in self._streamed:
                yield block
                continue
            self._take(index, has_keys=has_keys)
            try:
                yield block
            finally:
                # A walk that an exception cut off may be closed late, when the next one has begun.
                if walk == self._walk:
                    self._let_go()
            position += 1
            # Its slot is free from here on: the block after the next follows at once.
            self._fetch_ahead(position, has_keys=has_keys)

    def _lay_to_rest(self, block: nn.Module) -> _Streamed:
        layout = FlatLayout(block, keeps_phase=self._device.type == "cpu")
        source: Source
        if self.host == "ring":
            source = layout.scattered()
        else:
            source = host_buffer(layout.num_bytes, is_pinned=self.host == "pinned")
            layout.gather(source)
        return _Streamed(block, layout, source, [tensor.data for tensor in layout.tensors])

    def _new_copier(self) -> Copier:
        copier: Copier = StreamCopier(self._device) if self._device.type == "cuda" else ThreadCopier()
        if self.host == "ring":
            return RingCopier(copier, self.slot_bytes, is_pinned=self._device.type == "cuda")
        return copier

    def _fetch_ahead(self, position: int, *, has_keys: bool) -> None:
        """Let the slots hold the blocks from ``position`` on, in order of use; past the last, the first."""
        count = len(self._order)
        wanted = [self._order[(position + ahead) % count] for ahead in range(len(self._slots))]
        held = {slot.block for slot in self._slots}
        spare = [slot for slot in self._slots if slot.block not in wanted]
        for index, slot in zip([index for index in wanted if index not in held], spare, strict=False):
            slot.block, slot.num_bytes = index, 0
            slot.transfers.clear()
            self._fetch(slot, self._needed_bytes(index, has_keys=has_keys))

    def _fetch(self, slot: _Slot, stop: int) -> None:
        assert self._copier is not None and slot.block is not None
        source = self._streamed[slot.block].source
        slot.transfers.append(self._copier.fetch(slot.buffer, source, slot.num_bytes, stop, slot.free))
        self.counts.copies += 1
        self.counts.bytes += stop - slot.num_bytes
        slot.num_bytes = stop

    def _take(self, index: int, *, has_keys: bool) -> None:
        """Wait for a block (in the device's order of things) and let its tensors stand for its slot."""
        number, slot = next((n, slot) for n, slot in enumerate(self._slots) if slot.block == index)
        needed = self._needed_bytes(index, has_keys=has_keys)
        if slot.num_bytes < needed:
            self._fetch(slot, needed)  # it was sent without the layers of its keys, for a pass that had them
        try:
            for transfer in slot.transfers:
                transfer.wait()
        except BaseException:
            slot.block = None
            raise
        finally:
            slot.transfers.clear()
        one = self._streamed[index]
        if number not in one.views:
            one.views[number] = one.layout.views(slot.buffer)
        bind(one.layout.tensors, one.views[number])
        self._taken = (one, slot)

    def _let_go(self) -> None:
        """The block in use stands for its resting weights again; its slot may be written over."""
        if self._taken is not None and self._copier is not None:
            one, slot = self._taken
            bind(one.layout.tensors, one.resting)
            slot.free = self._copier.mark()
        self._taken = None

    def _needed_bytes(self, index: int, *, has_keys: bool) -> int:
        layout = self._streamed[index].layout
        return layout.bytes_without_keys if has_keys else layout.num_bytes

    def _check_not_moved(self) -> None:
        for index, one in self._streamed.items():
            for tensor, resting in zip(one.layout.tensors, one.resting, strict=True):
                if tensor.data_ptr() != resting.data_ptr() or tensor.dtype != resting.dtype:
                    raise MovedModelError(
                        f"The weights of block {index} were moved or replaced by hand after "
                        "enable_vram_management(). Call disable_vram_management() first, move the model, and "
                        "enable it again."
                    )

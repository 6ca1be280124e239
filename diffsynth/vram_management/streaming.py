"""Blocks that rest in host memory and come to the device just before their turn.

A few slots of the size of a block lie ready on the device. While one block computes in its slot, the next
ones are on their way into the others; behind the last block of a pass come the first of the next. Nothing is
copied back: the host's copy never changes, a slot is simply written over.

In training the blocks come a second time, from the last to the first, for a backward pass that computes each
of them again (`BlockStream.bring_back`). Tensors that train are no part of the stream: they stay where they
are, and so do their gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError, MovedModelError, PinnedMemoryError
from diffsynth.vram_management.copiers import (
    Copier,
    FlatSource,
    RingCopier,
    Source,
    StreamCopier,
    ThreadCopier,
    host_buffer,
)
from diffsynth.vram_management.flat import FlatLayout, bind, resting_tensors
from diffsynth.vram_management.host_memory import lasting_memory, unlock_buffer
from diffsynth.vram_management.slots import Slot, StreamCounts, StreamedBlock

logger = logging.getLogger("diffsynth")

Host = Literal["pinned", "ring", "pageable"]


def stream_blocks(blocks: Sequence[nn.Module], network: str, *, host: Host, **choices: Any) -> BlockStream:
    """Return a `BlockStream`, which reads through a ring where the system does not lock the memory.

    Args:
        blocks: of the network.
        network: its name, for the log.
        host: where the blocks are to rest.
        choices: as `BlockStream`.
    """
    try:
        return BlockStream(blocks, host=host, **choices)
    except PinnedMemoryError as error:
        logger.warning("%s Blocks of %s are read through a small ring instead.", error, network)
        return BlockStream(blocks, host="ring", **choices)


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
        rests_all: let resident blocks rest as the others do, and travel like them when the stream starts; for
            streams that take over from each other, see `hand_over`.

    Set from outside: ``returns``, that each pass is followed by one in reverse order, by `bring_back`.

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
        rests_all: bool = False,
    ) -> None:
        if num_slots < 2:
            raise ArgumentError(
                f"num_slots is {num_slots}; a block travels while another computes: give 2 or 3."
            )
        self.counts, self.host = StreamCounts(), host
        self.returns = False
        self._device, self._given_copier, self._blocks = device, copier, list(blocks)
        self._rested: dict[int, StreamedBlock] = {}  # every block that was streamed once
        self._streamed: dict[int, StreamedBlock] = {}
        self._resident: list[nn.Module] = []
        self._num_slots = num_slots
        self._slots: list[Slot] = []
        self._copier: Copier | None = None
        self._residing: list[tuple[Tensor, Tensor]] = []
        self._rests_all = rests_all
        self._own: dict[int, Slot] = {}  # of resident blocks that travelled; they keep it until the stop
        self._places: dict[int, Tensor] = {}  # for resident blocks that have not set out
        self._users = [0]  # streams that use the copier
        self._is_started = False
        self._successor: BlockStream | None = None
        self._is_last_walk = False
        self._taken: tuple[StreamedBlock, Slot] | None = None
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
            with lasting_memory():
                for index, block in enumerate(self._blocks):
                    if (self._rests_all or index not in stays) and index not in self._rested:
                        self._rested[index] = self._lay_to_rest(block)
        except PinnedMemoryError:
            for one in self._rested.values():
                if isinstance(one.source, FlatSource):
                    unlock_buffer(one.source.buffer)  # room for what is tried next
            raise
        self._resident = [block for i, block in enumerate(self._blocks) if i in stays and not self._rests_all]
        self._stays = sorted(stays) if self._rests_all else []
        self._streamed = {i: self._rested[i] for i in range(len(self._blocks)) if i not in stays}
        self._order, self._num_slots = list(self._streamed), num_slots

    @property
    def slot_bytes(self) -> int:
        """Size of one slot."""
        return max((one.layout.num_bytes for one in self._streamed.values()), default=0)

    def start(self) -> None:
        """Make the slots, bring the resident blocks, send the first blocks on their way."""
        if self._is_started:
            return
        if self._copier is None:
            self._check_not_moved()
            self._copier, self._users = self._given_copier or self._new_copier(), [1]
        self._is_started = True
        with lasting_memory():
            for block in self._resident:
                for _, tensor in resting_tensors(block):
                    self._residing.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(self._device)
            for _ in range(min(self._num_slots, len(self._order)) - len(self._slots)):
                buffer = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self._device)
                self._slots.append(Slot(buffer, self._copier.mark()))
                self.counts.slots_made += 1
            self._fetch_ahead(0, has_keys=False)
            for index in self._stays:
                if index not in self._own and index not in self._places:
                    size = self._rested[index].layout.num_bytes
                    self._places[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._settle_all()

    def stop(self) -> None:
        """Give the device's memory back; the blocks stand for their resting weights again."""
        if self._copier is None:
            return
        self._let_go()
        self._users[0] -= 1
        if self._users[0]:
            # The copies go on for another stream: what is under way has to end before its memory is let go.
            for transfer in (t for slot in (*self._slots, *self._own.values()) for t in slot.transfers):
                with suppress(Exception):  # nobody needs what it carries any more
                    transfer.wait()
        else:
            self._copier.close()
        self._copier, self._is_started = None, False
        self._successor, self._is_last_walk = None, False
        for tensor, resting in self._residing:
            tensor.data = resting
        self._residing.clear()
        for index in self._own:
            bind(self._rested[index].layout.tensors, self._rested[index].resting)
        self._own.clear()
        self._places.clear()
        self._slots.clear()
        for one in self._rested.values():
            one.views.clear()

    def close(self) -> None:
        """Stop; the blocks keep their weights in the host's memory, which stays locked while they live."""
        self.stop()

    def hand_over(self, successor: BlockStream) -> None:
        """Let another stream follow on the memory of this one, whose next walk is its last.

        Slots and places of resident blocks that this walk has done with go to the successor, whose blocks set
        out at once. When the successor starts, only blocks that found no room have to come. Another walk of
        this stream takes everything back.

        Args:
            successor: not started; what it has no use for is let go when this stream stops.
        """
        if self._is_started and successor._copier is None:
            successor._follow(self)
            self._successor, self._is_last_walk = successor, False

    def __call__(self, blocks: Iterable[nn.Module], *, has_keys: bool = False) -> Iterator[nn.Module]:
        """Yield the blocks in order, each with its weights on the device until the next one is asked for."""
        if self._successor is not None and self._is_last_walk:
            self._successor.stop()  # it was not the last: begin anew
            self.stop()
        self.start()
        self._is_last_walk = self._successor is not None
        self._let_go()
        self._walk += 1
        walk, position = self._walk, 0
        self._fetch_ahead(position, has_keys=has_keys)
        for index, block in enumerate(blocks):
            if index not in self._streamed:
                self._arrive(index)
                yield block
                self._pass_on(index)
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

    def bring_back(self, block: nn.Module) -> None:
        """Bring a block for its backward pass; it stays until the next one is asked for, or a pass begins.

        Args:
            block: one of this stream's; they are asked for from the last to the first.
        """
        self.start()
        self._walk += 1  # a walk that is closed late lets go of nothing
        index = next(i for i, own in enumerate(self._blocks) if own is block)
        if self._taken is not None and self._taken[0].module is block:
            return
        self._let_go()
        if index not in self._streamed:
            return
        self._fetch_ahead(2 * len(self._order) - 1 - self._order.index(index), has_keys=False)
        self._take(index, has_keys=False)

    def _lay_to_rest(self, block: nn.Module) -> StreamedBlock:
        layout = FlatLayout(block, keeps_phase=self._device.type == "cpu")
        source: Source
        if self.host == "ring":
            source = layout.scattered()
        else:
            gpu = self._device if self.host == "pinned" else None
            home = layout.home() if gpu is not None else None
            source = home or host_buffer(layout.num_bytes, gpu)
            if home is None:
                layout.gather(source)
        return StreamedBlock(block, layout, source, [tensor.data for tensor in layout.tensors])

    def _new_copier(self) -> Copier:
        copier: Copier = StreamCopier(self._device) if self._device.type == "cuda" else ThreadCopier()
        if self.host == "ring":
            gpu = self._device if self._device.type == "cuda" else None
            return RingCopier(copier, self._largest_bytes, gpu=gpu)
        return copier

    @property
    def _largest_bytes(self) -> int:
        """Of all blocks that travel, be it once."""
        own = (self._rested[index].layout.num_bytes for index in self._stays)
        return max(self.slot_bytes, max(own, default=0))

    def _follow(self, other: BlockStream) -> None:
        """Be ready for the memory of another stream; one copier, and one ring, serves both if it can."""
        self._check_not_moved()
        is_one_kind = self.host == other.host and self._given_copier is other._given_copier
        if is_one_kind and self._largest_bytes <= other._largest_bytes:
            self._copier, self._users = other._copier, other._users
            self._users[0] += 1
        else:
            self._copier, self._users = self._given_copier or self._new_copier(), [1]

    def _adopt(self, buffer: Tensor) -> None:
        """Take over a slot, and fill it with the next of the first blocks."""
        assert self._copier is not None
        count = len(self._slots)
        if count < min(self._num_slots, len(self._order)) and buffer.numel() >= self.slot_bytes:
            self._slots.append(Slot(buffer, self._copier.mark(), self._order[count]))
            self._fetch(self._slots[-1], self._needed_bytes(self._order[count], has_keys=False))
        self._settle_all()

    def _settle_all(self) -> None:
        """Send each resident block that has a place, behind the first block, which is needed first."""
        assert self._copier is not None
        places, self._places = self._places, {}
        for index, buffer in places.items():
            self._own[index] = Slot(buffer, self._copier.mark(), index)
            self._fetch(self._own[index], self._rested[index].layout.num_bytes)

    def _arrive(self, index: int) -> None:
        """Before the turn of a resident block: if it is still on its way, wait for it."""
        slot = self._own.get(index)
        if slot is None or not slot.transfers:
            return
        for transfer in slot.transfers:
            transfer.wait()
        slot.transfers.clear()
        bind(self._rested[index].layout.tensors, self._rested[index].layout.views(slot.buffer))

    def _pass_on(self, index: int) -> None:
        """After the last turn of a resident block: its twin in the successor takes its place."""
        if self._successor is None or index not in self._own:
            return
        next_one, size = self._successor, self._own[index].buffer.numel()
        if index in next_one._stays and next_one._rested[index].layout.num_bytes <= size:
            next_one._places[index] = self._own.pop(index).buffer
            bind(self._rested[index].layout.tensors, self._rested[index].resting)
            if next_one._slots or not next_one._order:
                next_one._settle_all()

    def _fetch_ahead(self, position: int, *, has_keys: bool) -> None:
        """Let the slots hold the blocks from ``position`` on, in order of use; past the last, the first.

        In the last walk there is nothing past the last: slots go to the successor.
        """
        count, slots = len(self._order), [slot for slot in self._slots if not slot.is_given]
        route = [*self._order, *reversed(self._order)] if self.returns else self._order
        num_ahead = count - position if self._is_last_walk else len(route)
        ahead = (route[(position + step) % len(route)] for step in range(num_ahead))
        wanted = list(islice(dict.fromkeys(ahead), len(slots)))  # at a turn some are here already
        held = {slot.block for slot in slots}
        spare = [slot for slot in slots if slot.block not in wanted]
        for index in (index for index in wanted if index not in held):
            slot = spare.pop(0)
            slot.block, slot.num_bytes = index, 0
            slot.transfers.clear()
            self._fetch(slot, self._needed_bytes(index, has_keys=has_keys))
        if self._is_last_walk and self._successor is not None:
            for slot in spare:
                slot.block, slot.is_given = None, True
                self._successor._adopt(slot.buffer)

    def _fetch(self, slot: Slot, stop: int) -> None:
        assert self._copier is not None and slot.block is not None
        source = self._rested[slot.block].source
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

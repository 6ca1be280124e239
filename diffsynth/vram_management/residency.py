"""Where networks rest and when they visit the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from diffsynth.errors import PinnedMemoryError
from diffsynth.ops.devices import on_stream
from diffsynth.vram_management.choices import LOW_NOISE
from diffsynth.vram_management.flat import bind
from diffsynth.vram_management.fp8 import widening
from diffsynth.vram_management.host_memory import host_has_room, is_locked, lasting_memory, lock_tensors
from diffsynth.vram_management.slots import StreamCounts
from diffsynth.vram_management.streaming import stream_blocks
from diffsynth.vram_management.visit import BlockNetwork, in_order

if TYPE_CHECKING:
    from diffsynth.vram_management.plan import NetworkPlan

logger = logging.getLogger("diffsynth")


class _Guest(Protocol):
    """A network, and the way in which it comes to the device."""

    may_lock: bool  # the host's memory, for what comes as a whole

    @property
    def locked_bytes(self) -> int: ...

    def enter(self) -> None: ...

    def send_ahead(self, twin: _Guest | None) -> None: ...

    def leave(self) -> None: ...

    def close(self) -> None: ...


class _Whole:
    """Comes as a whole: the device receives copies, which are dropped when it leaves.

    Set from outside: ``may_lock``, whether the host's memory may be locked for it.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self.may_lock = True
        self._tensors, self._device = tensors, device
        self._num_visits = 0
        self._resting: list[tuple[Tensor, Tensor]] = []
        self._coming: Future[None] | None = None
        self._ahead: list[Tensor] = []  # where they arrive

    def enter(self) -> None:
        if self._resting:
            return
        self._num_visits += 1
        if self._num_visits == 2:
            self._lock()
        self._resting = [(tensor, tensor.data) for tensor in self._absent()]
        if self._coming is None:
            with lasting_memory():
                for tensor, resting in self._resting:
                    tensor.data = resting.to(self._device, non_blocking=True)
            return
        arrived, coming = self._ahead, self._coming
        self._ahead, self._coming = [], None
        coming.result()
        bind([tensor for tensor, _ in self._resting], arrived)

    def send_ahead(self, twin: _Guest | None) -> None:
        """Begin to copy while another network computes; `enter` waits for what has not arrived."""
        absent = self._absent()
        if self._resting or self._coming is not None or not absent:
            return
        # The memory is taken here, in the order of the compute; a thread copies, for memory that is not
        # pinned holds up whoever copies it.
        with lasting_memory():
            self._ahead = [torch.empty_like(tensor, device=self._device) for tensor in absent]
        carry = _carrying([tensor.data for tensor in absent], self._ahead, self._device)
        worker = ThreadPoolExecutor(1, thread_name_prefix="diffsynth-ahead")
        self._coming = worker.submit(carry)
        worker.shutdown(wait=False)

    def leave(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming.exception()  # it ends before its memory goes
            self._ahead = []
        if self._resting:
            tensors, values = zip(*self._resting, strict=True)
            bind(tensors, values)
            self._resting = []

    def close(self) -> None:
        self.leave()

    def _lock(self) -> None:
        """Rest in page-locked memory from now on: who comes a second time comes often.

        Locking takes longer than one copy from plain memory, and makes each later one several times as fast.
        """
        absent = self._absent()
        if not self.may_lock or self._device.type != "cuda" or self._coming is not None:
            return
        if host_has_room(sum(tensor.nbytes for tensor in absent)):
            try:
                lock_tensors(absent, self._device)
            except PinnedMemoryError as error:
                logger.info("%s What is left travels from plain memory, more slowly.", error)

    @property
    def locked_bytes(self) -> int:
        """Of the host's memory, locked for it."""
        resting = [value for _, value in self._resting] or [tensor.data for tensor in self._tensors]
        return sum(value.nbytes for value in resting if value.device.type == "cpu" and is_locked(value))

    def _absent(self) -> list[Tensor]:
        return [tensor for tensor in self._tensors if tensor.device != self._device]


class _Streamed:
    """Its blocks are streamed; what is not in a block comes as a whole, but for tables read on the host."""

    def __init__(self, network: BlockNetwork, device: torch.device, plan: NetworkPlan) -> None:
        blocks = list(network.blocks)
        inside = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
        host_tables: tuple[str, ...] = getattr(network, "host_tables", ())
        rest = [
            tensor
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
            if id(tensor) not in inside and name not in host_tables
        ]
        self.may_lock = True
        self._network, self._rest = network, _Whole(rest, device)
        self.planned_host = plan.host  # the stream's own is "ring" where memory could not be pinned
        self.is_of_pair = plan.is_of_pair
        self.stream = stream_blocks(
            blocks, plan.network, device=device, resident=plan.resident_blocks, num_slots=plan.num_slots,
            host=plan.host, rests_all=plan.is_of_pair,
        )  # fmt: skip
        self._streaming = widening(network, self.stream)
        self._resting = widening(network, in_order)

    def enter(self) -> None:
        self._rest.may_lock = self.may_lock
        self._rest.enter()
        self.stream.start()
        self._network.visit = self._streaming

    @property
    def locked_bytes(self) -> int:
        """Of the host's memory, locked for what is in no block."""
        return self._rest.locked_bytes

    def send_ahead(self, twin: _Guest | None) -> None:
        """What is in no block sets out; blocks do when the twin, which is inside, has done with its own."""
        self._rest.send_ahead(None)
        if isinstance(twin, _Streamed):
            twin.stream.hand_over(self.stream)

    def leave(self) -> None:
        self._network.visit = self._resting
        self.stream.stop()
        self._rest.leave()

    def close(self) -> None:
        self.leave()
        self.stream.close()


class Residency:
    """Brings networks to the device for a phase and lets go of the copies afterwards.

    The tensors a network was loaded with stay on the host (perhaps in a mapped file, or in pinned buffers);
    the device receives copies, which are dropped when another phase begins. Nothing is ever copied back. A
    network that already is on the device is left alone, and so is one that says ``keeps_place``: somebody
    else streams it.

    Args:
        networks: by name; those that are None are not loaded.
        device: where they compute.
    """

    def __init__(self, networks: Mapping[str, nn.Module | None], device: torch.device) -> None:
        self._networks = {name: network for name, network in networks.items() if network is not None}
        self._device = device
        self._guests: dict[str, _Guest] = {}
        self._inside: set[str] = set()
        self._ahead: set[str] = set()  # sent, and not entered
        self._stays: set[str] = set()
        self._pairs: set[str] = set()
        self.arrange({})

    def name_networks(self, networks: Mapping[str, nn.Module | None]) -> None:
        """Hold these from now on; all of them rest."""
        self.close()
        self._networks = {name: network for name, network in networks.items() if network is not None}
        self._guests = {}
        self.arrange({})

    def move_to(self, device: torch.device) -> None:
        """Bring them to this device from now on; all of them rest."""
        self.close()
        self._device, self._guests = device, {}
        self.arrange({})

    def arrange(self, plans: Mapping[str, NetworkPlan], *, may_lock: bool = True) -> None:
        """Follow these plans from now on; a network without one comes for its phase as a whole.

        Args:
            plans: by name.
            may_lock: whether networks that come as a whole may rest in page-locked memory, where the host has
                room. Blocks that are streamed rest as their plan says.
        """
        self.release()
        for name, network in self._networks.items():
            plan, guest = plans.get(name), self._guests.get(name)
            if plan is None or plan.where != "streamed":
                if not isinstance(guest, _Whole):
                    is_placed = getattr(network, "keeps_place", False)
                    tensors = [] if is_placed else [*network.parameters(), *network.buffers()]
                    self._replace(name, _Whole(tensors, self._device))
            elif (
                isinstance(guest, _Streamed)
                and guest.planned_host == plan.host
                and guest.is_of_pair == plan.is_of_pair
            ):
                guest.stream.arrange(plan.resident_blocks, plan.num_slots)
            else:
                self._replace(name, _Streamed(cast("BlockNetwork", network), self._device, plan))
            self._guests[name].may_lock = may_lock
        self._stays = {name for name, plan in plans.items() if plan.where == "resident"}
        self._pairs = {name for name, plan in plans.items() if plan.is_of_pair}

    @contextmanager
    def use(self, *names: str) -> Iterator[None]:
        """Bring these in and send all others to rest; these stay until another phase needs the room."""
        self.enter(*names)
        yield

    def enter(self, *names: str) -> None:
        """`use`, without a block of code around it; costs nothing when they are inside already."""
        is_handed_over = bool(self._ahead & set(names))
        leaving = (self._inside - set(names) - self._stays) | (self._ahead - set(names))
        for name in leaving:
            self._guests[name].leave()
        self._inside -= leaving
        self._ahead = set()
        # Giving memory back waits for the device; who was sent ahead has taken over most of it anyway.
        if leaving and self._device.type == "cuda" and not is_handed_over:
            torch.cuda.empty_cache()
        for name in names:
            if name in self._guests and name not in self._inside:
                self._bring_in(name)

    def send_ahead(self, *names: str) -> None:
        """These come next, once the networks inside have walked through their blocks a last time.

        Of the later of two experts what is in no block sets out now, and its first blocks as soon as the
        earlier one has done with its own. Networks that are not planned as one of a pair wait for `enter`.
        """
        for name in names:
            if name in self._pairs and name not in self._inside | self._ahead:
                twin = name.removesuffix(LOW_NOISE) if name.endswith(LOW_NOISE) else name + LOW_NOISE
                self._ahead.add(name)
                self._guests[name].send_ahead(self._guests[twin] if twin in self._inside else None)

    def _bring_in(self, name: str) -> None:
        try:
            self._guests[name].enter()
        except BaseException:
            self._guests[name].leave()  # what had come goes back, so that the next call begins anew
            raise
        self._inside.add(name)

    def release(self) -> None:
        """Send everything to rest."""
        self._stays = set()
        self.enter()

    def close(self) -> None:
        """Send everything to rest and unlock the host's memory: plain networks again."""
        for name in self._networks:
            self._guests[name].close()
        self._inside, self._ahead, self._guests = set(), set(), {}
        self.arrange({})

    def locked_bytes(self) -> dict[str, int]:
        """Of the host's memory, locked for what comes as a whole, beside the blocks that are streamed."""
        found = {name: guest.locked_bytes for name, guest in self._guests.items()}
        return {name: num_bytes for name, num_bytes in found.items() if num_bytes}

    def counts(self, name: str) -> StreamCounts | None:
        """What was streamed of a network; None when it is not streamed."""
        guest = self._guests.get(name)
        return guest.stream.counts if isinstance(guest, _Streamed) else None

    def _replace(self, name: str, guest: _Guest) -> None:
        if name in self._guests:
            self._guests[name].close()
        self._guests[name] = guest


def _carrying(sources: list[Tensor], targets: list[Tensor], device: torch.device) -> Callable[[], None]:
    """Return what copies each source to its target, beside the compute, and ends when all have arrived."""
    if device.type != "cuda":
        return lambda: _copy(sources, targets)
    passed = torch.cuda.current_stream(device).record_event()  # the targets' memory is free from here on
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def carry() -> None:
        with on_stream(beside):
            beside.wait_event(passed)
            _copy(sources, targets)
            beside.synchronize()

    return carry


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)

"""Where networks rest and when they visit the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from diffsynth.errors import PinnedMemoryError
from diffsynth.vram_management.flat import bind
from diffsynth.vram_management.fp8 import widening
from diffsynth.vram_management.streaming import BlockStream, StreamCounts
from diffsynth.vram_management.visit import in_order

if TYPE_CHECKING:
    from diffsynth.vram_management.plan import NetworkPlan

logger = logging.getLogger("diffsynth")


class _Guest(Protocol):
    """A network, and the way in which it comes to the device."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...

    def close(self) -> None: ...


class _Whole:
    """Comes as a whole: the device receives copies, which are dropped when it leaves."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._resting: list[tuple[Tensor, Tensor]] = []

    def enter(self) -> None:
        if self._resting:
            return
        self._resting = [(tensor, tensor.data) for tensor in self._tensors if tensor.device != self._device]
        for tensor, resting in self._resting:
            tensor.data = resting.to(self._device)

    def leave(self) -> None:
        if self._resting:
            tensors, values = zip(*self._resting, strict=True)
            bind(tensors, values)
            self._resting = []

    def close(self) -> None:
        self.leave()


class _Streamed:
    """Its blocks are streamed; what is not in a block comes as a whole, but for tables read on the host."""

    def __init__(self, network: nn.Module, device: torch.device, plan: NetworkPlan) -> None:
        blocks = list(network.blocks)  # type: ignore[arg-type]
        inside = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
        host_tables: tuple[str, ...] = getattr(network, "host_tables", ())
        rest = [
            tensor
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
            if id(tensor) not in inside and name not in host_tables
        ]
        self._network, self._rest = network, _Whole(rest, device)
        self.planned_host = plan.host  # the stream's own is "ring" where memory could not be pinned
        self.stream = _stream(blocks, device, plan)
        self._streaming = widening(network, self.stream)
        self._resting = widening(network, in_order)

    def enter(self) -> None:
        self._rest.enter()
        self.stream.start()
        self._network.visit = self._streaming  # type: ignore[assignment]

    def leave(self) -> None:
        self._network.visit = self._resting  # type: ignore[assignment]
        self.stream.stop()
        self._rest.leave()

    def close(self) -> None:
        self.leave()
        self.stream.close()


class Residency:
    """Brings networks to the device for a phase and lets go of the copies afterwards.

    The tensors a network was loaded with stay on the host (perhaps in a mapped file, or in pinned buffers);
    the device receives copies, which are dropped when another phase begins. Nothing is ever copied back. A
    network that already is on the device is left alone.

    Args:
        networks: by name; those that are None are not loaded.
        device: where they compute.
    """

    def __init__(self, networks: Mapping[str, nn.Module | None], device: torch.device) -> None:
        self._networks = {name: network for name, network in networks.items() if network is not None}
        self._device = device
        self._guests: dict[str, _Guest] = {}
        self._inside: set[str] = set()
        self._stays: set[str] = set()
        self.arrange({})

    def arrange(self, plans: Mapping[str, NetworkPlan]) -> None:
        """Follow these plans from now on; a network without one comes for its phase as a whole."""
        self.release()
        for name, network in self._networks.items():
            plan, guest = plans.get(name), self._guests.get(name)
            if plan is None or plan.where != "streamed":
                if not isinstance(guest, _Whole):
                    self._replace(name, _Whole([*network.parameters(), *network.buffers()], self._device))
            elif isinstance(guest, _Streamed) and guest.planned_host == plan.host:
                guest.stream.arrange(plan.resident_blocks, plan.num_slots)
            else:
                self._replace(name, _Streamed(network, self._device, plan))
        self._stays = {name for name, plan in plans.items() if plan.where == "resident"}

    @contextmanager
    def use(self, *names: str) -> Iterator[None]:
        """Bring these in and send all others to rest; these stay until another phase needs the room."""
        self.enter(*names)
        yield

    def enter(self, *names: str) -> None:
        """`use`, without a block of code around it; costs nothing when they are inside already."""
        leaving = self._inside - set(names) - self._stays
        for name in leaving:
            self._guests[name].leave()
        self._inside -= leaving
        if leaving and self._device.type == "cuda":
            torch.cuda.empty_cache()
        for name in names:
            if name in self._guests and name not in self._inside:
                self._bring_in(name)

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
        self._inside, self._guests = set(), {}
        self.arrange({})

    def counts(self, name: str) -> StreamCounts | None:
        """What was streamed of a network; None when it is not streamed."""
        guest = self._guests.get(name)
        return guest.stream.counts if isinstance(guest, _Streamed) else None

    def _replace(self, name: str, guest: _Guest) -> None:
        if name in self._guests:
            self._guests[name].close()
        self._guests[name] = guest


def _stream(blocks: list[nn.Module], device: torch.device, plan: NetworkPlan) -> BlockStream:
    try:
        return BlockStream(
            blocks, device=device, resident=plan.resident_blocks, num_slots=plan.num_slots, host=plan.host
        )
    except PinnedMemoryError as error:
        logger.warning("%s Blocks of %s are read through a small ring instead.", error, plan.network)
        return BlockStream(
            blocks, device=device, resident=plan.resident_blocks, num_slots=plan.num_slots, host="ring"
        )

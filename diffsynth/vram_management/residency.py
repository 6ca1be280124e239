"""Where networks rest and when they visit the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Residency:
    """Brings a network to the device for a phase and lets go of the copy afterwards.

    The tensors a network was loaded with stay where they are (perhaps a mapped file); the device receives
    copies, which are dropped when another phase begins. Nothing is ever copied back. A network that already
    is on the device is left alone.

    Args:
        networks: by name; those that are None are not loaded.
        device: where they compute.
    """

    def __init__(self, networks: Mapping[str, nn.Module | None], device: torch.device) -> None:
        self._networks = networks
        self._device = device
        self._visiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def use(self, *names: str) -> Iterator[None]:
        """Bring these in and send all others to rest; these stay until another phase needs the room."""
        for name in [name for name in self._visiting if name not in names]:
            self._send_to_rest(name)
        for name in names:
            self._bring_in(name)
        yield

    def release(self) -> None:
        """Send everything to rest."""
        for name in list(self._visiting):
            self._send_to_rest(name)

    def _bring_in(self, name: str) -> None:
        network = self._networks.get(name)
        if network is None or name in self._visiting:
            return
        tensors = [t for t in (*network.parameters(), *network.buffers()) if t.device != self._device]
        if not tensors:
            return
        self._visiting[name] = [(tensor, tensor.data) for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self._device)

    def _send_to_rest(self, name: str) -> None:
        for tensor, resting in self._visiting.pop(name):
            tensor.data = resting
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

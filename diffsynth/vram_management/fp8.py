"""Fp8 weights widened once for all who use them while their block is visited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from diffsynth.ops.fp8 import Fp8Linear, WideningRoom, fp8_layers
from diffsynth.vram_management.visit import Visit, in_order


class WidenOnce:
    """A `Visit` around another one: while a block is there, each of its fp8 weights is widened at most once.

    A layer is called more than once per visit by the sides of the guidance, and by a feed-forward layer that
    takes its tokens in pieces. Without this each call widens for itself: the same numbers, and memory for one
    weight instead of those of a block (0.7 GB for a 14B model). A CPU shares always, for there widening takes
    longer than the product of few tokens. On a GPU it takes one or two hundredths of a block's time, and
    memory is dear: it shares when asked to, which pays for short clips.

    A weight is widened when it is first asked for, so that layers which a pass leaves out cost nothing. The
    memory is taken once per pass and let go at its end, or when an error ends it.

    Args:
        inner: brings the blocks in.
        shares_on_gpu: whether blocks on another device than the CPU share too.
    """

    def __init__(self, inner: Visit = in_order, *, shares_on_gpu: bool = False) -> None:
        self.inner, self.shares_on_gpu = inner, shares_on_gpu

    def __call__(self, blocks: Iterable[nn.Module], *, has_keys: bool = False) -> Iterator[nn.Module]:
        """Yield the blocks as ``inner`` does."""
        room = WideningRoom()
        for block in self.inner(blocks, has_keys=has_keys):
            layers = [layer for layer in fp8_layers(block) if self._shares(layer)]
            room.open(layers)
            try:
                yield block
            finally:
                room.close(layers)

    def _shares(self, layer: Fp8Linear) -> bool:
        return self.shares_on_gpu or layer.weight.device.type == "cpu"


def widening(network: nn.Module, inner: Visit = in_order, *, shares_on_gpu: bool = False) -> Visit:
    """Return ``inner``, inside a `WidenOnce` when the network keeps weights in fp8."""
    return WidenOnce(inner, shares_on_gpu=shares_on_gpu) if fp8_layers(network) else inner

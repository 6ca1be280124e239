"""How a network walks through its blocks: in order, unless a plan brings each block in for its turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import nn


class Visit(Protocol):
    """Set on a network from outside; its blocks are usable between two steps of the iterator."""

    def __call__(self, blocks: Iterable[nn.Module], *, has_keys: bool = False) -> Iterator[nn.Module]:
        """Yield the blocks in order.

        Args:
            blocks: all blocks of the network, every time.
            has_keys: the cross-attention keys and values of this pass are kept from an earlier one, so that
                the layers that make them are not needed.
        """


def in_order(blocks: Iterable[nn.Module], *, has_keys: bool = False) -> Iterator[nn.Module]:
    """All blocks are there: yield them."""
    return iter(blocks)

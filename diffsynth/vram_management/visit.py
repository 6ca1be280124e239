"""How a network walks through its blocks: in order, unless a plan brings each block in for its turn.

And how it runs one: at once, unless training wants the backward pass to compute the block again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn


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


class RunBlock(Protocol):
    """Set on a network from outside; runs each block while gradients are wanted."""

    def __call__(self, block: nn.Module, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``work(x)``.

        Args:
            block: whose weights ``work`` reads; here until the call returns.
            work: the block, given all that it needs besides its tokens; the same each time it is called.
            x: tokens, (B, L, D).
        """


def at_once(block: nn.Module, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All that the backward pass needs is kept: just run it."""
    return work(x)


class BlockNetwork(nn.Module):
    """A network whose blocks run one behind the other: a DiT, and adapters with blocks of their own.

    Set from outside: ``visit``, how blocks come in for their turn; ``run_block``, how a block runs in
    training; ``keeps_keys``, whether the keys of cross-attention stay from one step to the next;
    ``keeps_place``, whether somebody else decides where the weights lie.
    """

    def __init__(self) -> None:
        super().__init__()
        self.visit: Visit = in_order
        self.run_block: RunBlock = at_once
        self.keeps_keys = True
        self.keeps_place = False

    if TYPE_CHECKING:

        @property
        def blocks(self) -> nn.ModuleList:
            """What may be streamed, in order."""

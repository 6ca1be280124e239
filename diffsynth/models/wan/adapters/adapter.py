"""The five doors of the DiT, through which every variant of Wan enters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffsynth.models.wan.dit import WanDiT
    from diffsynth.models.wan.dit_config import DiTConfig
    from diffsynth.models.wan.stream import Call, TokenStream


class DiTAdapter(nn.Module):
    """Five doors into the DiT. Each is closed here; an adapter opens only those it needs.

    An adapter holds weights only. ``given`` is its own frozen input of this side of the guidance,
    ``conditions.adapters[self.name]``; an adapter without an input is not visited.
    """

    name: str

    def join(self, dit: DiTConfig) -> None:
        """Learn the sizes of the DiT that it is used with; raises ConfigurationError when they do not fit."""

    def modulate(self, t_mod: Tensor, given: object) -> Tensor:
        """Time modulation, (B, K, 6, D)."""
        return t_mod

    def embed(self, grid: Tensor, given: object) -> Tensor:
        """Patches before they become a sequence, (B, D, f, h, w)."""
        return grid

    def extend(self, stream: TokenStream, given: object, dit: WanDiT) -> TokenStream:
        """Add tokens in front or behind; say which clock they follow."""
        return stream

    def begin(self, stream: TokenStream, given: object, call: Call) -> object:
        """Compute once per call what `after_block` needs."""
        return None

    def after_block(self, index: int, x: Tensor, state: object) -> Tensor:
        """Add to the sequence after block ``index``, (B, L, D)."""
        return x

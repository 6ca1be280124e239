"""The doors of the DiT, through which every variant of Wan enters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffsynth.models.wan.dit import WanDiT
    from diffsynth.models.wan.dit_config import DiTConfig
    from diffsynth.models.wan.stream import Call, TokenStream
    from diffsynth.ops.attention import AttentionKernel
    from diffsynth.sampling.step import Step


class DiTAdapter(nn.Module):
    """Doors into the DiT, in the order in which a call passes them. Each is closed here.

    An adapter holds weights only. What it remembers of its input, ``conditions.adapters[self.name]``, is what
    `prepare` returned: ``memory``. An adapter without an input is not visited. ``step`` is None in training.
    """

    name: str

    def join(self, dit: DiTConfig) -> None:
        """Learn the sizes of the DiT that it is used with; raises ConfigurationError when they do not fit."""

    def prepare(self, given: object, dit: WanDiT) -> object:
        """What the other doors are handed as ``memory``.

        Called once for each input, expert and generation; sides of the guidance that share the input share
        the memory. In training called for each step, with gradients.
        """
        return given

    def embed(self, grid: Tensor, memory: object, step: Step | None = None) -> Tensor:
        """Patches before they become a sequence, (B, D, f, h, w)."""
        return grid

    def extend(self, stream: TokenStream, memory: object, step: Step | None = None) -> TokenStream:
        """Add tokens in front or behind, with rotary positions and times of their own."""
        return stream

    def time(self, embedded: Tensor, memory: object, step: Step | None = None) -> Tensor:
        """The embedding of the distinct times, (B, K, D): the head sees it too."""
        return embedded

    def modulate(self, t_mod: Tensor, memory: object, step: Step | None = None) -> Tensor:
        """Time modulation of the blocks, (B, K, 6, D)."""
        return t_mod

    def begin(self, stream: TokenStream, memory: object, call: Call, step: Step | None = None) -> object:
        """Compute once per call what `after_block` needs: ``state``."""
        return None

    def attend(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: object,
        step: Step | None,
        kernel: AttentionKernel,
    ) -> Tensor | None:
        """Stand in for the self-attention of block ``index``; None: leave it to ``kernel``.

        q, k and v are (B, L, N, d), turned by their rotary positions; so is the result. With
        ``attend_with_lse`` results over several sets of keys are joined.
        """
        return None

    def after_block(
        self, index: int, x: Tensor, state: object, memory: object, step: Step | None = None
    ) -> Tensor:
        """Add to the sequence after block ``index``, (B, L, D)."""
        return x

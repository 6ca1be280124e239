"""The sequence that runs through the DiT, and the clocks its tokens follow.

Letters: B batch, L tokens, D width, N heads, K distinct times of a call, F latent frames.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
    from diffsynth.models.wan.blocks import CrossKeys
    from diffsynth.models.wan.text_tokens import TextTokens
    from diffsynth.ops.attention import AttentionKernel
    from diffsynth.ops.fused import Span


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """All tokens of one side of the guidance in one call."""

    x: Tensor  # (B, L, D)
    rotary: Tensor  # (L, 1, D / N / 2, 2) float32, cosine and sine
    grid: tuple[int, int, int]  # frames, rows, columns of the video part, in patches
    video: slice  # which of the L tokens are the video
    times: Tensor  # (B, K), the distinct times of this call, 0..1000
    clock: Tensor | None  # (L,) on the CPU, which of the K a token follows; None when K = 1
    first: int = 0  # behind `split`: where in the whole sequence these tokens begin

    def with_tokens(
        self, tokens: Tensor, rotary: Tensor, *, times: Tensor | None = None, in_front: bool = True
    ) -> TokenStream:
        """Add tokens right in front of the video, or at the end of the sequence.

        Args:
            tokens: (B, A, D).
            rotary: (A, 1, D / N / 2, 2).
            times: (B, 1), the time that they follow, 0..1000; None: that of the video's last frame.
            in_front: or behind.
        """
        added, length = tokens.shape[1], self.x.shape[1]
        place = self.video.start if in_front else length

        def joined(ours: Tensor, theirs: Tensor, dim: int = 0) -> Tensor:
            parts = [ours.narrow(dim, 0, place), theirs, ours.narrow(dim, place, length - place)]
            return torch.cat([part for part in parts if part.shape[dim]], dim=dim)

        clock, all_times = self.clock, self.times
        if times is not None or clock is not None:
            clock = torch.zeros(length, dtype=torch.int64) if clock is None else clock
            own = clock[self.video.stop - 1] if times is None else torch.tensor(all_times.shape[1])
            clock = joined(clock, own.expand(added))
        if times is not None:
            all_times = torch.cat([all_times, times.to(all_times)], dim=1)
        moved = added if in_front else 0
        return replace(
            self,
            x=joined(self.x, tokens, dim=1),
            rotary=joined(self.rotary, rotary),
            video=slice(self.video.start + moved, self.video.stop + moved),
            times=all_times,
            clock=clock,
        )

    def with_video_rotary(self, rotary: Tensor) -> TokenStream:
        """Other rotary positions for the video's tokens, (L of the video, 1, D / N / 2, 2)."""
        parts = [self.rotary[: self.video.start], rotary, self.rotary[self.video.stop :]]
        return replace(self, rotary=torch.cat(parts))

    def with_distinct_times(self) -> TokenStream:
        """Equal times become one: embeddings and modulations are computed once for each."""
        if self.times.shape[1] == 1:
            return replace(self, clock=None)
        times, place = torch.unique(self.times, dim=1, return_inverse=True)
        if times.shape[1] == self.times.shape[1]:
            return self  # in their order
        assert self.clock is not None
        return replace(self, times=times, clock=None if times.shape[1] == 1 else place[self.clock])


class TokenSequence(Protocol):
    """How a sequence of tokens is shared between devices; set on a DiT from outside."""

    def split(self, stream: TokenStream) -> TokenStream:
        """The tokens of this device; ``first`` says where in the whole sequence they begin."""

    def gather(self, x: Tensor) -> Tensor:
        """The whole sequence, (B, L, D), of the tokens of each device."""


class WholeSequence:
    """One device has all tokens."""

    def split(self, stream: TokenStream) -> TokenStream:
        return stream

    def gather(self, x: Tensor) -> Tensor:
        return x


@dataclass(eq=False)
class KeySlot:
    """Where a block finds the keys of its cross-attention again, for one side of the guidance."""

    keeps: bool  # whether the block leaves them here
    keys: CrossKeys | None = None


class KeySlots:
    """Those of one side of the guidance, for all blocks that run for it: the DiT's and the adapters'."""

    def __init__(self) -> None:
        self._slots: dict[nn.Module, KeySlot] = {}

    def of(self, block: nn.Module, *, keeps: bool) -> KeySlot:
        """The slot of a block; with gradients one that holds nothing: keys depend on weights that train."""
        if torch.is_grad_enabled():
            return KeySlot(keeps=False)
        slot = self._slots.setdefault(block, KeySlot(keeps=keeps))
        slot.keeps = keeps
        return slot

    def clear(self) -> None:
        """Make all keys anew at the next call."""
        self._slots.clear()

    def hold_all(self, blocks: Iterable[nn.Module]) -> bool:
        """Whether the keys of all these are kept already."""
        slots = [self._slots.get(block) for block in blocks]
        return not torch.is_grad_enabled() and all(
            slot is not None and slot.keys is not None for slot in slots
        )


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a whole block needs besides its tokens: for adapters that run blocks of their own."""

    text: TextTokens
    image: Tensor | None  # embedded image tokens, (B, 257 or 514, D)
    t_mod: Tensor  # (B, K, 6, D) float32
    spans: tuple[Span, ...]  # where the clock of the stream changes
    self_attention: AttentionKernel
    cross_attention: AttentionKernel
    ffn_chunk_tokens: int
    keys: KeySlots
    shared: dict[nn.Module, object] = field(default_factory=dict)  # of an adapter, for all sides of this call


def read_clocks(timestep: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
    """Tell the distinct times of a call and which of them each video token follows.

    Args:
        timestep: (B,), (B, F) one per latent frame, or (B, L) one per token; 0..1000.
        grid: frames, rows, columns in patches.

    Returns:
        times (B, K) float64 on the CPU, clock (L,) int64 on the CPU or None when K = 1. Embeddings and
        modulations are then computed K times, never L times unless all L differ.
    """
    timestep = timestep.detach().to("cpu", torch.float64)
    frames, rows, columns = grid
    if timestep.ndim == 1:
        return timestep[:, None], None
    tokens = frames * rows * columns
    if timestep.ndim != 2 or timestep.shape[1] not in (frames, tokens):
        raise ArgumentError(
            f"timestep has shape {tuple(timestep.shape)}; expected (B,), (B, {frames}) for latent frames "
            f"or (B, {tokens}) for tokens."
        )
    times, clock = torch.unique(timestep, dim=1, return_inverse=True)
    if times.shape[1] == 1:
        return times, None
    if timestep.shape[1] == frames and frames != tokens:
        clock = clock.repeat_interleave(rows * columns)
    return times, clock

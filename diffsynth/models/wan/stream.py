"""The sequence that runs through the DiT, and the clocks its tokens follow.

Letters: B batch, L tokens, D width, N heads, K distinct times of a call, F latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
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


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a whole block needs besides its tokens: for adapters that run blocks of their own."""

    text: TextTokens
    t_mod: Tensor  # (B, K, 6, D) float32
    spans: tuple[Span, ...]  # where the clock of the stream changes
    attention: AttentionKernel
    ffn_chunk_tokens: int


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

"""What a step cache may look at before it answers: made when asked for."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from diffsynth.models.wan.stream import TokenStream


class Probe:
    """One side of the guidance at the door of the blocks. Letters: B batch, L tokens, D width.

    ``time`` and ``modulation`` are of the step's own clock, the noisiest of those that tokens follow: a clean
    first frame or a reference stand still.
    """

    def __init__(self, *, latents: Tensor, stream: TokenStream, embedded: Tensor, t_mod: Tensor) -> None:
        self.latents = latents  # (B, C, F, H, W)
        self._stream, self._embedded, self._t_mod = stream, embedded, t_mod

    @cached_property
    def _own(self) -> int:
        return int(torch.argmax(self._stream.times[0]))

    @property
    def time(self) -> Tensor:
        """The embedded time of the step, (B, D) float32."""
        return self._embedded[:, self._own]

    @property
    def modulation(self) -> Tensor:
        """Its six modulations, (B, 6, D) float32."""
        return self._t_mod[:, self._own]

    @property
    def x(self) -> Tensor:
        """Tokens before the first block, (B, L, D); blocks change them in place."""
        return self._stream.x

    @property
    def video(self) -> slice:
        """Which of the tokens are the video."""
        return self._stream.video

"""What a call of the denoiser is told of the step that it is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

ExpertName = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """One step of a generation. Letters: B batch, F latent frames, L tokens."""

    index: int  # from 0
    count: int  # of all steps
    sigma: float  # share of noise, 1 to 0
    timestep: Tensor  # as the network is told it: (B,), (B, F) or (B, L), 0..1000
    expert: ExpertName = "high"  # who answers; an expert alone is the high one
    next: Step | None = field(default=None, repr=False)

"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Experts


def guided(
    experts: Experts,
    latents: Tensor,
    timestep: Tensor,
    positive: Conditions,
    negative: Conditions,
    scale: float,
) -> Tensor:
    """Negative + scale (positive - negative), float32; at scale 1 the negative side is not asked."""
    if scale == 1.0:
        return experts(latents, timestep, [positive])[0]
    toward, away = experts(latents, timestep, [positive, negative])
    return away.lerp_(toward, scale)

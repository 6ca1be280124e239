"""The one denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsynth.conditioning.conditions import Conditions, LatentPlan
from diffsynth.denoising.expert import Experts
from diffsynth.denoising.guidance import guided
from diffsynth.errors import NotFiniteError
from diffsynth.sampling.sampler import Sampler

ProgressBar = Callable[[Iterable[Any]], Iterable[Any]]
OnStep = Callable[
    [int, Tensor, Tensor], "Tensor | None"
]  # step, timestep, latents -> latents, or None: stop here


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly the prompt pulls, by expert."""

    high: float  # of the high-noise expert, or the only one
    low: float


def denoise(  # noqa: PLR0913 (a generation has this many parts; each is named by its keyword)
    experts: Experts,
    sampler: Sampler,
    latents: Tensor,
    *,
    positive: Conditions,
    negative: Conditions,
    guidance: Guidance,
    plan: LatentPlan,
    on_step: OnStep,
    progress: ProgressBar,
    timestep_dtype: torch.dtype | None = None,
    first_step: int = 0,
) -> Tensor:
    """Walk from noise to video.

    Args:
        experts: answer with velocities.
        sampler: already reset; knows the noise levels.
        latents: (B, C, F, H, W) at the noise level of the first step.
        positive: conditions of what to show.
        negative: conditions of what to keep away from.
        guidance: scale of each expert.
        plan: frames that stay clean.
        on_step: sees the latents after each step; may change them, or stop the walk.
        progress: wraps the timesteps.
        timestep_dtype: rounds what the network is told, as DiffSynth v1 did; None keeps it.
        first_step: where a walk goes on that was left before this step; the sampler is restored to it.

    Raises:
        NotFiniteError: when a latent becomes NaN or infinite; names the step.
    """
    clean_frames = torch.arange(latents.shape[2]) < plan.num_pinned
    for index, told in enumerate(progress(sampler.timesteps[first_step:]), start=first_step):
        experts.foresee(sampler.timesteps[index + 1] if index + 1 < len(sampler.timesteps) else None)
        time = told if timestep_dtype is None else told.to(timestep_dtype)
        timestep = time.double().expand(latents.shape[0])
        is_high = experts.is_high(told)
        if plan.num_pinned:
            timestep = timestep[:, None].expand(-1, latents.shape[2]).masked_fill(clean_frames, 0.0)
        scale = guidance.high if is_high else guidance.low
        velocity = guided(experts, latents, timestep, positive, negative, scale)
        latents = plan.pin(sampler.step(velocity, index, latents))
        if not torch.isfinite(latents.sum(dtype=torch.float32)):
            raise NotFiniteError(
                f"The latents are not finite after step {index + 1} of {len(sampler.timesteps)} "
                f"(timestep {float(told):g}). Usual causes: weights cast to float16 (use bfloat16), "
                "a broken LoRA, or a damaged checkpoint."
            )
        changed = on_step(index, told, latents)
        if changed is None:
            return latents
        latents = changed
    return latents

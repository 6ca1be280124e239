"""The one denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth.conditioning.conditions import LatentPlan
from diffsynth.denoising.expert import Experts
from diffsynth.denoising.guidance import Guided, guided
from diffsynth.errors import NotFiniteError
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.step import Step

ProgressBar = Callable[[Iterable[Any]], Iterable[Any]]
OnStep = Callable[
    [int, Tensor, Tensor], "Tensor | None"
]  # step, timestep, latents -> latents, or None: stop here


def steps_of(
    sampler: Sampler,
    experts: Experts,
    shape: Sequence[int],
    *,
    num_pinned: int = 0,
    timestep_dtype: torch.dtype | None = None,
) -> list[Step]:
    """All steps of a generation, each knowing the next.

    Args:
        sampler: already reset; knows the noise levels.
        experts: say who answers.
        shape: (B, C, F, H, W) of the latents.
        num_pinned: first latent frames that stay clean, at time 0.
        timestep_dtype: rounds what the network is told, as DiffSynth v1 did; None keeps it.
    """
    count, steps = len(sampler.timesteps), list[Step]()
    clean_frames = torch.arange(shape[2]) < num_pinned
    for index in reversed(range(count)):
        told = sampler.timesteps[index]
        time = told if timestep_dtype is None else told.to(timestep_dtype)
        timestep = time.double().expand(shape[0])
        if num_pinned:
            timestep = timestep[:, None].expand(-1, shape[2]).masked_fill(clean_frames, 0.0)
        following = steps[-1] if steps else None
        steps.append(
            Step(
                index=index,
                count=count,
                sigma=float(sampler.sigmas[index]),
                timestep=timestep,
                expert=experts.name_at(told),
                next=following,
            )
        )
    return steps[::-1]


def denoise(
    experts: Experts,
    sampler: Sampler,
    latents: Tensor,
    *,
    steps: Sequence[Step],
    branches: Sequence[Guided],
    plan: LatentPlan,
    on_step: OnStep,
    progress: ProgressBar,
) -> Tensor:
    """Walk from noise to video.

    Args:
        experts: answer with velocities; a generation has begun for them.
        sampler: already reset, or restored to the first of the steps.
        latents: (B, C, F, H, W) at the noise level of the first step.
        steps: those that are to be walked, from `steps_of`.
        branches: the sides of the guidance.
        plan: frames that stay clean.
        on_step: sees the latents after each step; may change them, or stop the walk.
        progress: wraps the timesteps.

    Raises:
        NotFiniteError: when a latent becomes NaN or infinite; names the step.
    """
    if not steps:
        return latents
    # The bar comes first: it ends by itself, when it has no more to give.
    for told, step in zip(progress(sampler.timesteps[steps[0].index :]), steps, strict=False):
        velocity = guided(experts, latents, step, branches)
        latents = plan.pin(sampler.step(velocity, step.index, latents))
        if not torch.isfinite(latents.sum(dtype=torch.float32)):
            raise NotFiniteError(
                f"The latents are not finite after step {step.index + 1} of {step.count} "
                f"(timestep {float(told):g}). Usual causes: weights cast to float16 (use bfloat16), "
                "a broken LoRA, or a damaged checkpoint."
            )
        changed = on_step(step.index, told, latents)
        if changed is None:
            return latents
        latents = changed
    return latents

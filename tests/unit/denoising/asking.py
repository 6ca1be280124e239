"""Asks experts for one step, without a loop around."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Experts, Side
from diffsynth.sampling.step import Step


def at(timestep: float) -> Tensor:
    return torch.full((1,), timestep, dtype=torch.float64)


def step_at(experts: Experts, timestep: Tensor, next_step: Step | None = None) -> Step:
    return Step(
        index=0, count=1, sigma=float(timestep.max()) / 1000, timestep=timestep,
        expert=experts.name_at(timestep), next=next_step,
    )  # fmt: skip


def ask(experts: Experts, latents: Tensor, timestep: Tensor, sides: Sequence[Conditions]) -> list[Tensor]:
    """One velocity per side."""
    told = [Side(index=index, conditions=conditions) for index, conditions in enumerate(sides)]
    return experts(latents, step_at(experts, timestep), told)

"""Euler's method: each step follows the velocity found at its start. The sampler of DiffSynth v1."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from diffsynth.sampling.sampler import GridSampler, Noise
from diffsynth.sampling.schedule import NUM_TRAIN_TIMESTEPS


class EulerSampler(GridSampler):
    """First order, no memory: x' = x + (sigma' - sigma) v. The network is told 1000 * sigma, not truncated.

    Source: DiffSynth v1 ``schedulers/flow_match.py``,
    FlowMatchScheduler(shift=5, sigma_min=0, extra_one_step=True).
    """

    # v1 made its grid in float32: the same bits give the same bf16 timesteps, and an old seed its old video.
    grid_dtype: ClassVar[torch.dtype] = torch.float32

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """Return 1000 * sigma, (N,) float32."""
        return sigmas.float() * NUM_TRAIN_TIMESTEPS

    def step(self, velocity: Tensor, index: int, latents: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Return the latents at ``sigmas[index + 1]``; computed in the type of ``latents``, in any order."""
        self._check_step(velocity, index, latents)
        return latents + velocity.to(latents.dtype) * self._changes[index]

    def _prepare(self, sigmas: list[float]) -> None:
        self._changes = [after - before for before, after in pairwise(sigmas)]

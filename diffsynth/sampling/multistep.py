"""What UniPC and DPM-Solver++ share: a step that also looks back at the prediction before.

Both solve for the clean video m = x - sigma * v in the time lambda = log((1 - sigma) / sigma), in which the
decay of the noise is exact and only the change of m must be estimated. With h = lambda' - lambda, one step is

    x' = (sigma' / sigma) x + c m + (c / 2) (m - m_before) / r,    c = (1 - sigma') (1 - exp(-h)),

where r is the length of the step before over h. Without a step before the last term is absent (first order).
Every factor is a number known before the first step, so a step is a weighted sum of a few tensors.

Letters: N steps; m a prediction of the clean latents. Latents have any shape, usually (B, C, F, H, W).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError
from diffsynth.sampling.sampler import GridSampler, Noise
from diffsynth.sampling.schedule import truncated_timesteps


class Prediction(NamedTuple):
    """Factors of the three tensors whose sum is the next sample."""

    sample: float  # of x, the latents now
    clean: float  # of m, what they are predicted to become
    before: float  # of the m of the step before; 0 where the step is of first order


class MultistepSampler(GridSampler):
    """A solver that remembers: steps are taken in order from 0, and step 0 forgets the run before.

    Arithmetic is float32 on the latents' device (float64 if the latents are), whatever the velocity's type.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next_index = 0

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """Return 1000 * sigma cut to int64, (N,)."""
        return truncated_timesteps(sigmas)

    def step(self, velocity: Tensor, index: int, latents: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Return the latents at ``sigmas[index + 1]``; see `Sampler.step`.

        Raises:
            ArgumentError: for a step out of order, or shapes that differ.
        """
        self._check_step(velocity, index, latents)
        if index == 0:
            self._forget()
        elif index != self._next_index:
            raise ArgumentError(
                f"Step {index} was asked for after {self._next_index} steps; this solver looks back, so take "
                f"the steps in order: {self._next_index} is next, 0 starts again."
            )
        precise = latents if latents.dtype == torch.float64 else latents.float()
        sample = self._advance(velocity, index, precise)
        if index + 1 == len(self.timesteps):
            self._forget()
        else:
            self._next_index = index + 1
        return sample.to(latents.dtype)

    def state(self) -> dict[str, Tensor]:
        """What the next step looks back at; see `Sampler.state`."""
        return {name: getattr(self, f"_{name}") for name in self._remembered_before(self._next_index)}

    def restore(self, next_index: int, state: Mapping[str, Tensor]) -> None:
        """Go on at a later step; see `Sampler.restore`."""
        super().restore(next_index, state)
        self._forget()
        for name, tensor in state.items():
            setattr(self, f"_{name}", tensor.clone())  # the next step may write into it
        self._next_index = next_index if next_index < len(self.timesteps) else 0

    @abstractmethod
    def _advance(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """Take step ``index`` in the precision of ``latents``, which stay as they are."""

    def _forget(self) -> None:
        self._next_index = 0


def log_signal_to_noise(sigma: float) -> float:
    """Return lambda = log((1 - sigma) / sigma): minus infinity at pure noise, infinity at the clean video."""
    if sigma <= 0.0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1.0 else -math.inf


def predictions(sigmas: list[float]) -> list[Prediction]:
    """Return the factors of each of the N steps between N + 1 falling levels that end in 0.

    The first step has nothing to look back to; the last, to sigma 0, is x' = m. A first level of exactly 1
    lies at lambda = -infinity: the second step is then of first order too, the limit of the formula.

    Source: Wan2.1 ``wan/utils/fm_solvers.py`` (dpmsolver++, order 2, midpoint, lower_order_final); the
    predictor of ``fm_solvers_unipc.py`` (bh2, order 2) is the same sum.
    """
    levels = [log_signal_to_noise(sigma) for sigma in sigmas]
    factors = []
    for index in range(len(sigmas) - 1):
        h = levels[index + 1] - levels[index]
        change = (1.0 - sigmas[index + 1]) * -math.expm1(-h)
        second_order = 0.0
        if 0 < index < len(sigmas) - 2:
            second_order = 0.5 * change * h / (levels[index] - levels[index - 1])
        factors.append(Prediction(sigmas[index + 1] / sigmas[index], change + second_order, -second_order))
    return factors


def predict(factors: Prediction, sample: Tensor, clean: Tensor, before: Tensor | None) -> Tensor:
    """Return the next sample from the sample now and the last two predictions of the clean one."""
    if factors.sample == 0.0:
        return clean  # the last step, after which nothing is remembered
    next_sample = (sample * factors.sample).add_(clean, alpha=factors.clean)
    if before is not None and factors.before != 0.0:
        next_sample.add_(before, alpha=factors.before)
    return next_sample

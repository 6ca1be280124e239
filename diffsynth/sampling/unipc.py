"""UniPC of second order, the official repository's default sampler.

A step first corrects the sample it was given, now that the network has answered for it, and then predicts the
next. The predictor is that of DPM-Solver++ (``multistep.py``). The corrector redoes the step before, from its
start s to the current level t, with m_new (predicted from the uncorrected sample) in the sum:

    x = (sigma_t / sigma_s) x_s + c (m + rho_0 (m_before - m) / r + rho_1 (m_new - m)),

where c = (1 - sigma_t) (1 - exp(-h)) and h = lambda_t - lambda_s as there, and the negative
r = (lambda_before - lambda_s) / h. It costs no call of the network.

Letters: N steps; m a prediction of the clean latents. Latents have any shape, usually (B, C, F, H, W).
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffsynth.sampling.multistep import (
    MultistepSampler,
    Prediction,
    log_signal_to_noise,
    predict,
    predictions,
)


class Correction(NamedTuple):
    """Factors of the four tensors whose sum is the corrected sample."""

    start: float  # of the corrected sample that the step before started from
    clean: float  # of m at that start
    before: float  # of m one step earlier; 0 where there is none
    new: float  # of m at the sample being corrected


class UniPCSampler(MultistepSampler):
    """Second order, bh2; corrects at every step but the first; the first and last prediction are first order.

    Source: Wan2.1 ``wan/utils/fm_solvers_unipc.py``, FlowUniPCMultistepScheduler(1000, shift=1,
    solver_order=2); Zhao et al. 2023, arXiv:2302.04867.
    """

    # 0.999 as the float32 that the official code keeps it in; it decides the last bits of the grid.
    top: ClassVar[float] = 0.9990000128746033

    def _prepare(self, sigmas: list[float]) -> None:
        self._levels = [_below_one(sigmas[0]), *sigmas[1:]]
        self._predictions: list[Prediction] = predictions(self._levels)
        self._corrections = corrections(self._levels)
        self._forget()

    def _remembered_before(self, next_index: int) -> tuple[str, ...]:
        names = ("clean", "start", "before") if next_index > 1 else ("clean", "start")
        return names if 0 < next_index < len(self.timesteps) else ()

    def _forget(self) -> None:
        super()._forget()
        self._clean: Tensor | None = None  # m of the step before
        self._before: Tensor | None = None  # m one step earlier
        self._start: Tensor | None = None  # the corrected sample that the step before started from

    def _advance(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        new = latents.sub(velocity, alpha=self._levels[index])
        if self._clean is None or self._start is None:
            sample = latents.clone()  # remembered, and the caller may write into its own
        else:
            start, clean, before, fresh = self._corrections[index - 1]
            sample = self._start.mul_(start).add_(self._clean, alpha=clean).add_(new, alpha=fresh)
            if self._before is not None and before != 0.0:
                sample.add_(self._before, alpha=before)
        next_sample = predict(self._predictions[index], sample, new, self._clean)
        self._start, self._before, self._clean = sample, self._clean, new
        return next_sample


def corrections(sigmas: list[float]) -> list[Correction]:
    """Return the factors of the corrections at steps 1 to N - 1 between N + 1 levels below 1 that end in 0.

    The two rho solve rho_0 + rho_1 = b_1 and r rho_0 + rho_1 = b_2, where b_k = k! phi_(k+1)(-h) / phi_1(-h),
    phi_1(z) = exp(z) - 1 and phi_(k+1)(z) = phi_k(z) / z - 1 / k!. With nothing before, rho_1 is set to 1/2.
    """
    levels = [log_signal_to_noise(sigma) for sigma in sigmas]
    factors = []
    for index in range(1, len(sigmas) - 1):
        h = levels[index] - levels[index - 1]
        phi_1 = math.expm1(-h)
        change = (1.0 - sigmas[index]) * -phi_1
        rho_before, rho_new = 0.0, 0.5
        if index > 1:
            r = (levels[index - 2] - levels[index - 1]) / h
            phi_2 = phi_1 / -h - 1.0
            phi_3 = phi_2 / -h - 0.5
            b_1, b_2 = phi_2 / phi_1, 2.0 * phi_3 / phi_1
            rho = (b_2 - b_1) / (r - 1.0)
            rho_before, rho_new = rho / r, b_1 - rho
        factors.append(
            Correction(
                start=sigmas[index] / sigmas[index - 1],
                clean=change * (1.0 - rho_before - rho_new),
                before=change * rho_before,
                new=change * rho_new,
            )
        )
    return factors


def _below_one(sigma: float) -> float:
    """Return a first level whose lambda is finite; a user's grid may start at exactly 1.

    Source: diffusers UniPCMultistepScheduler, which lowers such a level by 1e-6 and keeps it as float32.
    """
    return float(torch.tensor(sigma - 1e-6, dtype=torch.float32)) if 1.0 - sigma < 1e-6 else sigma

"""DPM-Solver++ of second order, the official repository's other sampler.

Each step predicts the clean latents m = x - sigma * v and extrapolates from this and the last m; the formula
is told in ``multistep.py``. The grid starts at pure noise, sigma 1 and timestep 1000.
"""

from __future__ import annotations

from torch import Tensor

from diffsynth.sampling.multistep import MultistepSampler, Prediction, predict, predictions


class DPMSolverPlusPlusSampler(MultistepSampler):
    """Second order, one prediction remembered; the first and the last step are of first order.

    Source: Wan2.1 ``wan/utils/fm_solvers.py``, FlowDPMSolverMultistepScheduler(1000, shift=1, solver_order=2,
    algorithm_type="dpmsolver++", solver_type="midpoint"); Lu et al. 2022, arXiv:2211.01095, algorithm 2M.
    """

    def _prepare(self, sigmas: list[float]) -> None:
        self._levels = sigmas
        self._predictions: list[Prediction] = predictions(sigmas)
        self._forget()

    def _remembered_before(self, next_index: int) -> tuple[str, ...]:
        return ("before",) if 0 < next_index < len(self.timesteps) else ()

    def _forget(self) -> None:
        super()._forget()
        self._before: Tensor | None = None

    def _advance(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        clean = latents.sub(velocity, alpha=self._levels[index])
        sample = predict(self._predictions[index], latents, clean, self._before)
        self._before = clean
        return sample

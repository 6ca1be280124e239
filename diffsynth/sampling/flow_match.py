"""Noise levels under the names of DiffSynth-Studio's scheduler, for scripts that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsynth.sampling.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shifted_sigmas


class FlowMatchScheduler:
    """Euler's steps along a grid of noise levels; see `EulerSampler`, which generations use.

    Args:
        shift: how far the levels lean to the noisy end.

    ``sigmas`` and ``timesteps`` (N,) are float32 on the CPU; the timesteps are 1000 times the sigmas.
    """

    num_train_timesteps = NUM_TRAIN_TIMESTEPS

    def __init__(self, shift: float = 5.0) -> None:
        self.shift = shift
        self.set_timesteps()

    def set_timesteps(
        self, num_inference_steps: int = 50, denoising_strength: float = 1.0, shift: float | None = None
    ) -> None:
        """Make the grid of so many steps.

        Raises:
            ArgumentError: as `shifted_sigmas`.
        """
        self.shift = self.shift if shift is None else shift
        self.sigmas = shifted_sigmas(
            num_inference_steps, shift=self.shift, strength=denoising_strength, dtype=torch.float32
        )
        self.timesteps = self.sigmas * NUM_TRAIN_TIMESTEPS

    def read(self, sigmas: Tensor, timesteps: Tensor) -> None:
        """Show the grid of a sampler: sigmas with the final 0, timesteps as the network is told them."""
        self.sigmas, self.timesteps = sigmas[: len(timesteps)].float().cpu(), timesteps.float().cpu()

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, to_final: bool = False
    ) -> Tensor:
        """The latents at the next noise level, or at 0 after the last one or with ``to_final``."""
        index = self._index(timestep)
        is_last = to_final or index + 1 >= len(self.sigmas)
        after = 0.0 if is_last else float(self.sigmas[index + 1])
        return sample + model_output * (after - float(self.sigmas[index]))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Clean latents with the noise of a timestep."""
        return add_noise(original_samples, noise, float(self.sigmas[self._index(timestep)]))

    def training_target(self, sample: Tensor, noise: Tensor, timestep: object = None) -> Tensor:
        """The velocity that a network is trained to give: from the clean latents to the noise."""
        return noise - sample

    def _index(self, timestep: Tensor | float) -> int:
        """The step whose timestep is nearest; scripts round theirs to bfloat16."""
        wanted = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        return int((self.timesteps - wanted).abs().argmin())

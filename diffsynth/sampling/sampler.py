"""What the denoising loop asks of a sampler, and the part that all samplers share: the grid.

Letters: N steps, B batch, C latent channels, F latent frames, H W latent height and width. Latents and
velocities have one shape, any, usually (B, C, F, H, W): samplers work value by value. The
network predicts the velocity v = noise - video, so that video = x - sigma * v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError
from diffsynth.sampling.schedule import checked_sigmas, checked_timesteps, require_falling, shifted_sigmas

Noise = Callable[[int], Tensor]  # number of a step -> noise of the latents' shape: the same at every call


class Sampler(Protocol):
    """Walks latents from noise to video along falling noise levels."""

    sigmas: Tensor  # (N + 1,) float32 on the CPU, falling, ends in exactly 0
    timesteps: Tensor  # (N,) on the CPU, 0..1000: what the network is told at each step

    def reset(self, num_steps: int, shift: float, strength: float = 1.0) -> None:
        """Make the sampler's own grid and forget the run before; arguments as in `shifted_sigmas`."""
        ...

    def set_sigmas(
        self, sigmas: Sequence[float] | Tensor, timesteps: Sequence[float] | Tensor | None = None
    ) -> None:
        """Take a user's grid in place of steps, shift and strength, and forget the run before.

        Args:
            sigmas: (N,) falling, above 0 and up to 1, without the final 0.
            timesteps: (N,) what the network is told, 0..1000; by default the sampler's own rule.
        """
        ...

    def step(self, velocity: Tensor, index: int, latents: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Return the latents at ``sigmas[index + 1]``.

        Args:
            velocity: what the network answered for ``latents`` and ``timesteps[index]``.
            index: number of the step, counted from 0. Steps are known by it and never by their timestep,
                which large shifts repeat.
            latents: at ``sigmas[index]``; not changed.
            noise: for solvers that add fresh noise; the others leave it alone.

        Returns:
            New latents, of the shape, type and device of ``latents``.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What the next step looks back at, by name, each shaped like the latents; empty where it does not.

        With the number of the next step this is all that `restore` needs. The tensors are the sampler's own:
        the next step may write into them.
        """
        ...

    def restore(self, next_index: int, state: Mapping[str, Tensor]) -> None:
        """Go on at step ``next_index``, on this grid, as the sampler whose `state` this was would have.

        Args:
            next_index: number of the next step; as many as there are steps where none is left.
            state: on the device of the latents; not changed.

        Raises:
            ArgumentError: for a step that this grid does not have, or the state of another sampler or step.
        """
        ...


class GridSampler(ABC):
    """The grid of a sampler: how it is made, checked and told to the network."""

    top: ClassVar[float] = 1.0  # first level of the unshifted grid at strength 1
    grid_dtype: ClassVar[torch.dtype] = torch.float64

    def __init__(self) -> None:
        self.sigmas: Tensor = torch.zeros(1, dtype=torch.float32, device="cpu")
        self.timesteps: Tensor = torch.zeros(0, dtype=torch.float32, device="cpu")

    def reset(self, num_steps: int, shift: float, strength: float = 1.0) -> None:
        """Make the sampler's own grid; see `Sampler.reset`.

        Raises:
            ArgumentError: for a number of steps, shift or strength that cannot work.
        """
        exact = shifted_sigmas(num_steps, shift=shift, strength=strength, top=self.top, dtype=self.grid_dtype)
        advice = f"Give fewer than {num_steps} steps or a sigma_shift below {shift:g}."
        self._install(exact, self.timesteps_of(exact), advice)

    def set_sigmas(
        self, sigmas: Sequence[float] | Tensor, timesteps: Sequence[float] | Tensor | None = None
    ) -> None:
        """Take a user's grid; see `Sampler.set_sigmas`.

        Raises:
            ArgumentError: when sigmas do not fall, hold the final 0, NaN or a value above 1, or timesteps
                are too few, too many or outside 0..1000.
        """
        exact = checked_sigmas(sigmas)
        told = self.timesteps_of(exact) if timesteps is None else checked_timesteps(timesteps, len(exact))
        self._install(exact, told)

    @abstractmethod
    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """Return what the network is told at each of these levels; both (N,)."""

    @abstractmethod
    def step(self, velocity: Tensor, index: int, latents: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Return the latents at ``sigmas[index + 1]``; see `Sampler.step`."""

    def state(self) -> dict[str, Tensor]:
        """What the next step looks back at: nothing, unless a sampler says otherwise; see `Sampler.state`."""
        return {}

    def restore(self, next_index: int, state: Mapping[str, Tensor]) -> None:
        """Go on at a later step; see `Sampler.restore`.

        Raises:
            ArgumentError: for a step that this grid does not have, or the state of another sampler or step.
        """
        num_steps = len(self.timesteps)
        if not 0 <= next_index <= num_steps:
            raise ArgumentError(f"Step {next_index} was asked for; this run has {num_steps} steps.")
        names = self._remembered_before(next_index)
        if set(state) != set(names):
            raise ArgumentError(
                f"The state holds {', '.join(sorted(state)) or 'nothing'} and step {next_index} looks back "
                f"at {', '.join(names) or 'nothing'}: it is of another sampler or step."
            )

    def _remembered_before(self, next_index: int) -> tuple[str, ...]:
        """Names of the tensors that step ``next_index`` looks back at."""
        return ()

    def _install(self, sigmas: Tensor, timesteps: Tensor, advice: str = "") -> None:
        levels = torch.cat([sigmas.float(), sigmas.new_zeros(1, dtype=torch.float32)])
        require_falling(levels, advice)
        self.sigmas, self.timesteps = levels, timesteps
        self._prepare(levels.tolist())

    @abstractmethod
    def _prepare(self, sigmas: list[float]) -> None:
        """Compute every coefficient of the run from its N + 1 levels, and forget the run before."""

    def _check_step(self, velocity: Tensor, index: int, latents: Tensor) -> None:
        num_steps = len(self.timesteps)
        if num_steps == 0:
            raise ArgumentError("The sampler has no noise levels yet; call reset() or set_sigmas() first.")
        if not 0 <= index < num_steps:
            raise ArgumentError(f"Step {index} was asked for; this run has the steps 0 to {num_steps - 1}.")
        if velocity.shape != latents.shape:
            raise ArgumentError(
                f"The velocity has the shape {tuple(velocity.shape)} and the latents {tuple(latents.shape)}; "
                "they must be equal."
            )

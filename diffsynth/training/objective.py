"""What training asks of the network: the velocity from a clean video to noise, at drawn noise levels.

Letters: B batch, C latent channels, F latent frames, H W latent height and width.
Sigma is the share of noise in a latent; the network is told the timestep t = 1000 sigma. A noisy latent is
(1 - sigma) latents + sigma noise, and its target is noise - latents. Noise and sigma are functions of (seed,
step, sample) and of nothing else: not of the batch, the device, the number of processes or what ran before.

Source: DiffSynth v1 ``schedulers/flow_match.py`` (levels and weight of the default); Stable Diffusion 3,
arXiv 2403.03206, section 3.1 (logit_normal, mode).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError
from diffsynth.sampling.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shifted_sigmas

Levels = Literal["v1", "uniform", "logit_normal", "shift", "mode"]
Weighting = Literal["bell", "none"]

LEVELS = ("v1", "uniform", "logit_normal", "shift", "mode")
WEIGHTINGS = ("bell", "none")
LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # beyond it the levels of "mode" are no longer one-to-one


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """At which noise levels a sample is shown, and how much each counts. Units stand beside each field."""

    levels: Levels = "v1"  # "v1": the 1000 levels of a shifted grid, each as likely; the rest is continuous
    shift: float = 5.0  # of "v1" and "shift": how far the levels lean to the noisy end; 1 is even
    logit_mean: float = 0.0  # of "logit_normal": mean of log(sigma / (1 - sigma)); 0 is centred on 0.5
    logit_std: float = 1.0  # of "logit_normal": its deviation
    mode_scale: float = 1.29  # of "mode": above 0 favours the middle, below 0 the ends; -1 to 1.75
    weighting: Weighting = "bell"  # "bell": most around t = 500, nothing at 1000, 1 on average; "none": all 1
    min_timestep: float = 0.0  # 0 to 1000: levels below it are not drawn
    max_timestep: float = 1000.0  # 0 to 1000: nor those above

    def __post_init__(self) -> None:
        for name, value, known in (
            ("levels", self.levels, LEVELS),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if value not in known:
                raise ArgumentError(f"objective.{name} is {value!r}; known: {', '.join(known)}.")
        for name in ("shift", "logit_std"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ArgumentError(f"objective.{name} is {getattr(self, name)}; give a number above 0.")
        if not math.isfinite(self.logit_mean):
            raise ArgumentError(f"objective.logit_mean is {self.logit_mean}; give a number (0 is centred).")
        if not -1.0 <= self.mode_scale <= LARGEST_MODE_SCALE:
            raise ArgumentError(
                f"objective.mode_scale is {self.mode_scale}; give -1 to {LARGEST_MODE_SCALE:.2f} (1.29 is "
                "usual)."
            )
        if not 0.0 <= self.min_timestep < self.max_timestep <= NUM_TRAIN_TIMESTEPS:
            raise ArgumentError(
                f"objective.min_timestep is {self.min_timestep} and max_timestep {self.max_timestep}; give "
                f"0 <= min_timestep < max_timestep <= {NUM_TRAIN_TIMESTEPS}."
            )


class FlowMatchObjective:
    """See this module's legend.

    Args:
        config: levels and weights.

    Raises:
        ArgumentError: when no level lies between ``min_timestep`` and ``max_timestep``.
    """

    def __init__(self, config: ObjectiveConfig | None = None) -> None:
        self.config = config or ObjectiveConfig()
        self._range(0.0, NUM_TRAIN_TIMESTEPS)

    def draw(
        self,
        seed: int,
        step: int,
        sample_ids: Sequence[str],
        shape: Sequence[int],
        low: float = 0.0,
        high: float = NUM_TRAIN_TIMESTEPS,
    ) -> tuple[Tensor, Tensor]:
        """Draw the noise levels and the noise of a batch, on the CPU.

        Args:
            seed: of the run.
            step: of the optimizer; with accumulation, of the micro-batch too (count them all).
            sample_ids: one for each sample. A sample that stands twice in a step gets the same noise twice,
                unless its ids differ.
            shape: of one sample, (C, F, H, W).
            low: lowest timestep of this expert, 0 to 1000.
            high: its highest.

        Returns:
            sigma (B,) float64 and noise (B, C, F, H, W) float32.

        Raises:
            ArgumentError: when no level lies between ``low`` and ``high``.
        """
        sigmas, noise = [], []
        for sample in sample_ids:
            generator = generator_of(seed, step, sample)
            quantile = float(torch.rand((), generator=generator, dtype=torch.float64))
            sigmas.append(self.sigma_at(quantile, low, high))
            noise.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
        return torch.tensor(sigmas, dtype=torch.float64), torch.stack(noise)

    def sigma_at(self, quantile: float, low: float = 0.0, high: float = NUM_TRAIN_TIMESTEPS) -> float:
        """The level that a share ``quantile`` of the draws lies above.

        Args:
            quantile: 0 (the noisiest) to 1, without 1.
            low: lowest timestep.
            high: highest timestep.

        Raises:
            ArgumentError: when no level lies between ``low`` and ``high``.
        """
        first, last = self._range(low, high)
        if self.config.levels == "v1":
            return float(self._grid[int(first + quantile * (last - first))])
        return self._level(first + quantile * (last - first))

    def noisy(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """(1 - sigma) latents + sigma noise; (B, C, F, H, W) each, sigma (B,). Returns latents' dtype."""
        return add_noise(latents, noise.to(latents.device), sigma.float())

    def timesteps(self, sigma: Tensor, num_frames: int, num_pinned: int = 0) -> Tensor:
        """What the network is told, 0..1000: (B,); (B, F) where the first ``num_pinned`` frames are clean."""
        told = sigma.double() * NUM_TRAIN_TIMESTEPS
        if not num_pinned:
            return told
        clean = torch.arange(num_frames) < num_pinned
        return told[:, None].expand(-1, num_frames).masked_fill(clean, 0.0)

    def weight(self, sigma: Tensor) -> Tensor:
        """How much each sample counts: (B,) -> (B,) float32 on the CPU."""
        if self.config.weighting == "none":
            return torch.ones(sigma.shape)
        bottom, mean = self._bell_scale
        return ((_bell(sigma.detach().double().cpu()) - bottom) / mean).float()

    def losses(
        self, velocity: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor, num_pinned: int = 0
    ) -> Tensor:
        """The weighted mean square error of each sample, without its pinned frames.

        Args:
            velocity: what the network answered, (B, C, F, H, W).
            latents: clean, of the same shape.
            noise: as drawn.
            sigma: (B,).
            num_pinned: first frames that the network was given clean: they are no task.

        Returns:
            (B,) float32 on the device of ``velocity``.

        Raises:
            ArgumentError: when no frame is left, or shapes differ.
        """
        if velocity.shape != latents.shape or noise.shape != latents.shape:
            raise ArgumentError(
                f"velocity has shape {tuple(velocity.shape)}, latents {tuple(latents.shape)} and noise "
                f"{tuple(noise.shape)}; expected three equal ones."
            )
        if not 0 <= num_pinned < latents.shape[2]:
            raise ArgumentError(
                f"{num_pinned} of {latents.shape[2]} latent frames are given clean; nothing is left to learn."
                " Use longer clips."
            )
        target = noise.to(velocity.device).float() - latents.to(velocity.device).float()
        error = (velocity.float() - target)[:, :, num_pinned:]
        weight = self.weight(sigma).to(velocity.device, non_blocking=True)
        return error.square().flatten(1).mean(1) * weight

    def loss(
        self, velocity: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor, num_pinned: int = 0
    ) -> Tensor:
        """The mean of `losses`: what is differentiated."""
        return self.losses(velocity, latents, noise, sigma, num_pinned).mean()

    @cached_property
    def _grid(self) -> Tensor:
        """1000 levels, falling: those of v1, or quantiles of the continuous ones."""
        if self.config.levels == "v1":
            return shifted_sigmas(NUM_TRAIN_TIMESTEPS, shift=self.config.shift)
        middles = ((i + 0.5) / NUM_TRAIN_TIMESTEPS for i in range(NUM_TRAIN_TIMESTEPS))
        return torch.tensor([self._level(middle) for middle in middles], dtype=torch.float64)

    @cached_property
    def _bell_scale(self) -> tuple[float, float]:
        """The bell's foot, at t = 1000, and its mean height above it over the levels that are drawn."""
        bottom = float(_bell(torch.ones((), dtype=torch.float64)))
        return bottom, float((_bell(self._grid) - bottom).mean())

    def _range(self, low: float, high: float) -> tuple[float, float]:
        """First and last quantile (v1: index) whose timestep lies within the limits."""
        bottom = max(low, self.config.min_timestep) / NUM_TRAIN_TIMESTEPS
        top = min(high, self.config.max_timestep) / NUM_TRAIN_TIMESTEPS
        if self.config.levels == "v1":
            first = float((self._grid > top).sum())
            last = float((self._grid >= bottom).sum())
        else:
            first, last = (_crossing(self._level, level) for level in (top, bottom))
        if not first < last:
            raise ArgumentError(
                f"No noise level is drawn between the timesteps {bottom * NUM_TRAIN_TIMESTEPS:g} and "
                f"{top * NUM_TRAIN_TIMESTEPS:g}; widen objective.min_timestep and max_timestep."
            )
        return first, last

    def _level(self, quantile: float) -> float:
        """Continuous levels, falling from quantile 0 to 1."""
        config, u = self.config, 1.0 - quantile
        if config.levels == "shift":
            return config.shift * u / (1 + (config.shift - 1) * u)
        if config.levels == "mode":
            return u - config.mode_scale * (math.sin(math.pi * u / 2) ** 2 - u)
        if config.levels == "logit_normal":
            inside = min(max(u, 1e-12), 1 - 1e-12)  # the ends are never reached
            return 1 / (1 + math.exp(-NormalDist(config.logit_mean, config.logit_std).inv_cdf(inside)))
        return u


def generator_of(seed: int, step: int, sample: str) -> torch.Generator:
    """A generator on the CPU that only these three decide."""
    digest = hashlib.sha256(f"{seed}/{step}/{sample}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2)


def _crossing(level: Callable[[float], float], wanted: float) -> float:
    """The quantile at which a falling level passes ``wanted``."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if level(middle) > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2

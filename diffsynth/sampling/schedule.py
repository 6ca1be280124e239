"""Noise levels of one generation, and the mixing of a clean video with noise.

Letters: N steps, B batch, C latent channels, F latent frames, H W latent height and width.
Sigma is the share of noise in a latent: 1 is pure noise, 0 is the clean video. The network is not told sigma
but a timestep, near 1000 * sigma. A grid is N falling sigmas; samplers append the final 0 themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError

NUM_TRAIN_TIMESTEPS = 1000  # the networks' timesteps run from 0 (clean) to 1000 (noise)


def shifted_sigmas(
    num_steps: int,
    *,
    shift: float,
    strength: float = 1.0,
    top: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the noise levels at which the denoiser is asked.

    Args:
        num_steps: calls of the denoiser, at least 1.
        shift: how far the levels lean to the noisy end; 1 is even, Wan uses 3 to 12.
        strength: share of noise laid over an input video, above 0 and up to 1; 1 ignores the video.
        top: first level of the unshifted grid at strength 1.
        dtype: precision of the arithmetic. Float64 as in the official solvers, whose integer timesteps depend
            on the last bit.

    Returns:
        (N,) of ``dtype``, falling, without the final 0. Strength scales the even grid before it is shifted:
        0.7 with shift 5 starts at 0.92105.

    Raises:
        ArgumentError: when ``num_steps`` is below 1, ``shift`` not above 0, or ``strength`` outside (0, 1].

    Source: Wan2.1 ``wan/utils/fm_solvers.py`` get_sampling_sigmas, DiffSynth v1 ``schedulers/flow_match.py``;
    sigma' = k s / (1 + (k - 1) s).
    """
    if not isinstance(num_steps, Integral) or num_steps < 1:
        raise ArgumentError(f"num_inference_steps is {num_steps}; give a whole number from 1 (50 is usual).")
    if not (shift > 0.0 and math.isfinite(shift)):
        raise ArgumentError(f"sigma_shift is {shift}; give a value above 0 (1 is even, Wan uses 3 to 12).")
    if not 0.0 < strength <= 1.0:
        raise ArgumentError(
            f"denoising_strength is {strength}; give a value above 0 and up to 1 "
            "(0.7 keeps the layout of input_video, 1 ignores it)."
        )
    start = strength * top
    if dtype == torch.float64:
        # Not torch.linspace: it counts its second half from the end, which changes last bits, and with them
        # some of the official integer timesteps.
        even = torch.arange(num_steps, dtype=dtype, device="cpu") * (-start / num_steps) + start
    else:
        even = torch.linspace(start, 0.0, num_steps + 1, dtype=dtype, device="cpu")[:-1]
    return shift * even / (1 + (shift - 1) * even)


def checked_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    """Return a user's own noise levels as (N,) float64 on the CPU.

    Raises:
        ArgumentError: when there is none, or one is NaN, above 1, or 0 or less, or they do not fall.
    """
    given = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    if given.ndim != 1 or len(given) == 0:
        raise ArgumentError(
            f"sigmas has the shape {tuple(given.shape)}; give one number per step, such as [1.0, 0.9, 0.75]."
        )
    for index, sigma in enumerate(given.tolist()):
        what = f"sigmas[{index}] is {sigma}"
        if not math.isfinite(sigma):
            raise ArgumentError(f"{what}; give numbers above 0 and up to 1.")
        if sigma == 0.0 and index == len(given) - 1:
            raise ArgumentError(f"{what}; leave the final 0 out, the sampler adds it.")
        if sigma <= 0.0:
            raise ArgumentError(f"{what}; every noise level is above 0 (the sampler adds the final 0).")
        if sigma > 1.0:
            raise ArgumentError(f"{what}; a noise level is at most 1. Divide timesteps (0 to 1000) by 1000.")
    require_falling(given, "Give them from the noisiest to the cleanest, each once.")
    return given


def checked_timesteps(timesteps: Sequence[float] | Tensor, num_steps: int) -> Tensor:
    """Return what a user wants the network to be told, (N,) int64 if all are integers, else float32.

    Raises:
        ArgumentError: when there are not ``num_steps`` of them, or one is outside 0..1000.
    """
    given = torch.as_tensor(timesteps, device="cpu").detach()
    if given.shape != (num_steps,):
        raise ArgumentError(
            f"timesteps has the shape {tuple(given.shape)}, there are {num_steps} sigmas; give one per sigma."
        )
    for index, timestep in enumerate(given.tolist()):
        if not 0 <= timestep <= NUM_TRAIN_TIMESTEPS:
            raise ArgumentError(
                f"timesteps[{index}] is {timestep}; give 0 (clean) to {NUM_TRAIN_TIMESTEPS} (noise)."
            )
    return given.to(torch.float32 if given.is_floating_point() else torch.int64)


def require_falling(sigmas: Tensor, advice: str) -> None:
    """Raise ArgumentError, ending in ``advice``, if two neighbours do not fall once they are float32."""
    levels = sigmas.float()
    stuck = (levels.diff() >= 0).nonzero()
    if len(stuck):
        index = int(stuck[0])
        raise ArgumentError(
            f"The noise levels do not fall: sigmas[{index}] is {levels[index]:g}, "
            f"sigmas[{index + 1}] is {levels[index + 1]:g}. {advice}"
        )


def truncated_timesteps(sigmas: Tensor) -> Tensor:
    """Return 1000 * sigma cut to int64, (N,), as the official solvers tell the network.

    The product is taken in the precision of ``sigmas``, float64 as in the official code: 874.9999999999999
    is 874.
    """
    return (sigmas * NUM_TRAIN_TIMESTEPS).to(torch.int64)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Return ``(1 - sigma) * latents + sigma * noise``, the straight line between a video and noise.

    Args:
        latents: clean latents, (B, C, F, H, W) or any shape.
        noise: standard normal, of the same shape.
        sigma: one noise level for all, or a tensor of the leading dimensions ((B,): one per sample).

    Returns:
        Noisy latents, of the shape and type of ``latents``.
    """
    if isinstance(sigma, Tensor) and sigma.ndim > 0:
        sigma = sigma.to(latents.device).reshape(sigma.shape + (1,) * (latents.ndim - sigma.ndim))
    return ((1 - sigma) * latents + sigma * noise).to(latents.dtype)

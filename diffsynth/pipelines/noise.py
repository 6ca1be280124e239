"""Where a generation starts: its noise levels, and the noise itself."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError
from diffsynth.pipelines.request import VideoRequest
from diffsynth.sampling.registry import SAMPLERS
from diffsynth.sampling.sampler import Sampler

logger = logging.getLogger("diffsynth")


def prepared_sampler(request: VideoRequest) -> Sampler:
    """Return the sampler of a request, set to its grid of noise levels."""
    options = request.options
    sampler = SAMPLERS[str(options.sampler)]()
    if options.sigmas is not None:
        sampler.set_sigmas(options.sigmas, options.timesteps)
    else:
        assert options.num_inference_steps is not None and options.sigma_shift is not None
        sampler.reset(options.num_inference_steps, options.sigma_shift, request.denoising_strength)
    return sampler


def draw_noise(request: VideoRequest) -> tuple[Tensor, int | None]:
    """Noise (B, C, F, H, W) float32 and the seed it came from (None when the caller gave the noise)."""
    options, shape = request.options, request.geometry.latent_shape
    if options.latents is not None:
        if options.seed is not None:
            raise ArgumentError(
                "seed and latents are both given; latents are the noise that a seed would draw."
            )
        if tuple(options.latents.shape) != shape:
            raise ArgumentError(
                f"latents have shape {tuple(options.latents.shape)}; this request needs {shape}."
            )
        return options.latents.float(), None
    seed = options.seed
    if seed is None:
        seed = int(torch.randint(0, 2**31 - 1, ()))
        logger.info("seed=%d was drawn.", seed)
    rows = []
    try:
        generator = torch.Generator(options.rand_device)
    except RuntimeError as error:
        raise ArgumentError(
            f"rand_device is {options.rand_device!r}; give 'cpu', or 'cuda' where there is a GPU."
        ) from error
    for index in range(shape[0]):
        # float32 on the CPU whatever the device, unless asked otherwise: one seed, one video, on every
        # machine.
        generator.manual_seed(seed + index)
        rows.append(torch.randn((1, *shape[1:]), generator=generator, device=options.rand_device))
    return torch.cat(rows), seed

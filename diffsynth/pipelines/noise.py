"""Where a generation starts: the noise."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from diffsynth.announce import announce
from diffsynth.errors import ArgumentError
from diffsynth.pipelines.request import VideoRequest

logger = logging.getLogger("diffsynth")

DRAWN = -1  # the seed that asks for any, as in ComfyUI and the official command


def chosen_seed(request: VideoRequest) -> int | None:
    """The seed of a request, drawn if it gives none; None when the caller gives the noise itself.

    Raises:
        ArgumentError: when both are given, the noise has another shape than the latents, or it cannot be
            drawn where it is asked for.
    """
    options = request.options
    if options.latents is not None:
        if options.seed not in (None, DRAWN):
            raise ArgumentError(
                "seed and latents are both given; latents are the noise that a seed would draw."
            )
        _check_shape(options.latents, noise_shape(request, request.extra_frames))
        return None
    _generator(options.rand_device)
    if options.seed not in (None, DRAWN):
        return int(options.seed)
    seed = int(torch.randint(0, 2**31 - 1, ()))
    if options.seed == DRAWN:
        announce("seed is -1, which asks for any: seed=%d was drawn.", seed)
    else:
        logger.info("seed=%d was drawn.", seed)
    return seed


def draw_noise(request: VideoRequest, seed: int | None, extra_frames: int = 0) -> Tensor:
    """Noise (B, C, extra_frames + F, H, W) float32; sample i from ``seed`` + i.

    Raises:
        ArgumentError: when the caller's noise has another shape.
    """
    options = request.options
    shape = noise_shape(request, extra_frames)
    if options.latents is not None:
        _check_shape(options.latents, shape)
        return options.latents.float()
    assert seed is not None
    generator, rows = _generator(options.rand_device), []
    for index in range(shape[0]):
        # float32 on the CPU whatever the device, unless asked otherwise: one seed, one video, on every
        # machine.
        generator.manual_seed(seed + index)
        rows.append(torch.randn((1, *shape[1:]), generator=generator, device=options.rand_device))
    return torch.cat(rows)


def noise_shape(request: VideoRequest, extra_frames: int) -> tuple[int, ...]:
    """(B, C, extra_frames + F, H, W)."""
    num_videos, channels, num_frames, height, width = request.geometry.latent_shape
    return num_videos, channels, extra_frames + num_frames, height, width


def _check_shape(latents: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(latents.shape) != shape:
        raise ArgumentError(f"latents have shape {tuple(latents.shape)}; this request needs {shape}.")


def _generator(device: str) -> torch.Generator:
    try:
        return torch.Generator(device)
    except RuntimeError as error:
        raise ArgumentError(
            f"rand_device is {device!r}; give 'cpu', or 'cuda' where there is a GPU."
        ) from error

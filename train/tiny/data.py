"""What the tiny Wan is trained on: drawn clips, cut where something happens, in many colours."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from diffsynth.tiny.draw import draw_batch
from diffsynth.tiny.grammar import Scene, random_scene

SIZE = 64  # pixels, both ways


def draw_scenes(rng: random.Random, count: int, num_frames: int, pairs: float = 0.3) -> list[Scene]:
    """Return ``count`` scenes; ``pairs`` is the share with two things."""
    return [random_scene(rng, 2 if rng.random() < pairs else 1, num_frames) for _ in range(count)]


def vae_batch(rng: random.Random, count: int, num_frames: int, crop: int, recoloured: float = 0.3) -> Tensor:
    """Return clips for the VAE: (B, 3, F, crop, crop) float32 in [-1, 1].

    Args:
        rng: decides everything.
        count: B.
        num_frames: F.
        crop: side of the cut, pixels; cuts lie mostly over a thing, where there is something to learn.
        recoloured: share of clips whose colours are mixed at random, so that the VAE knows more than the
            grammar's.
    """
    scenes = draw_scenes(rng, count, num_frames)
    clips = draw_batch(scenes, num_frames, SIZE)
    cuts = []
    for clip, scene in zip(clips, scenes, strict=True):
        coloured = _recolour(clip, rng) if rng.random() < recoloured else clip
        top, left = _corner(scene, rng, num_frames, crop)
        cuts.append(coloured[:, :, top : top + crop, left : left + crop])
    return torch.stack(cuts)


def _corner(scene: Scene, rng: random.Random, num_frames: int, crop: int) -> tuple[int, int]:
    if crop == SIZE:
        return 0, 0
    if rng.random() < 0.15:
        return rng.randint(0, SIZE - crop), rng.randint(0, SIZE - crop)
    x, y, _ = rng.choice(scene.things).at(rng.randrange(num_frames), num_frames)
    corner = [round(at + rng.uniform(-0.4, 0.4) * crop - crop / 2) for at in (y, x)]
    return min(max(corner[0], 0), SIZE - crop), min(max(corner[1], 0), SIZE - crop)


def _recolour(clip: Tensor, rng: random.Random) -> Tensor:
    """Mix the channels at random, staying inside [-1, 1]."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    mix = torch.randn(3, 3, generator=generator)
    mix = mix / mix.abs().sum(dim=1, keepdim=True)  # each new channel is a mean of the old ones
    shift = (1 - mix.abs().sum(dim=1).max()) + 0.3 * (torch.rand(3, generator=generator) - 0.5)
    return (torch.einsum("dc,cfhw->dfhw", mix, clip) * 1.2 + shift.view(3, 1, 1, 1)).clamp(-1, 1)

"""Weights and inputs that the stored reference numbers (tests/data/golden) were computed from.

Nothing here is trained: a parameter is drawn from its official checkpoint name, its shape and a seed, an
input from its tag, its shape and a seed, so that both sides of a comparison can draw the same numbers without
sharing a file. Only parameters are drawn; buffers (rotary tables, blur kernels) are computed by the model.

Scales are chosen so that activations neither vanish nor explode and no parameter is without effect: layers
that training starts at zero are drawn like all others. Everything is drawn on the CPU, in float32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Shape = Sequence[int]


def recipe_tensor(name: str, shape: Shape, seed: int = 0) -> Tensor:
    """Return the float32 parameter of the official checkpoint key ``name``."""
    shape = tuple(int(size) for size in shape)
    normal = _normal(f"{seed}:{name}", shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("gamma", "weights") or (len(shape) == 1 and leaf == "weight"):
        return 1.0 + 0.1 * normal  # scale of a norm, mixing weights
    if len(shape) <= 1:
        return 0.05 * normal  # bias, or any other vector
    if leaf in ("modulation", "head_modulation"):
        return normal / math.sqrt(shape[-1])
    is_table = len(shape) == 2 and name.endswith("embedding.weight")  # of tokens or buckets
    is_equalised = name.startswith("motion_encoder.") and leaf == "weight"  # forward divides by sqrt(fan_in)
    if is_table or is_equalised:
        return normal
    if len(shape) >= 3 and shape[0] == 1 and leaf != "weight":
        return 0.3 * normal  # learned tokens and positions
    return normal / math.sqrt(math.prod(shape[1:]))  # matrices and convolutions: 1 / sqrt(fan_in)


def recipe_state_dict(shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, Tensor]:
    """Return every parameter of a model, drawn from ``{official key: shape}``."""
    return {name: recipe_tensor(name, shape, seed) for name, shape in shapes.items()}


def recipe_input(tag: str, shape: Shape, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return a float32 input, standard normal times ``scale``."""
    return _normal(f"input:{seed}:{tag}", shape) * scale


def recipe_ids(tag: str, shape: Shape, low: int, high: int, seed: int = 0) -> Tensor:
    """Return int64 token ids, uniform in [low, high)."""
    return torch.randint(low, high, tuple(shape), generator=_generator(f"ids:{seed}:{tag}"))


def recipe_frames(tag: str, frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return uint8 RGB frames (F, H, W, 3): moving colour waves and a little noise."""
    generator = _generator(f"frames:{seed}:{tag}")
    drawn = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    noise = torch.randint(0, 24, (frames, height, width, 3), generator=generator)
    axes = (torch.arange(size, dtype=torch.float64) for size in (frames, height, width))
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    waves = [
        torch.sin((0.10 + 0.3 * c[0]) * x + (0.10 + 0.3 * c[1]) * y + (0.2 + c[2]) * t + 6.28 * c[3])
        for c in drawn
    ]
    # the grid of 1/64 keeps 115 + 105 sin away from ties of rounding
    base = torch.floor((115 + 105 * torch.stack(waves, -1)) * 64).long() // 64
    return (base + noise).clamp(0, 255).to(torch.uint8)


def fingerprint(tensors: Mapping[str, Tensor]) -> tuple[int, float, float]:
    """Return check values: crc32 of names and shapes, sum of |t|, sum of t weighted by name."""
    names = sorted(tensors)
    shapes = "\n".join(f"{name}:{tuple(tensors[name].shape)}" for name in names)
    total = sum(float(tensors[name].double().abs().sum()) for name in names)
    mixed = sum(zlib.crc32(name.encode()) / 2**32 * float(tensors[name].double().sum()) for name in names)
    return zlib.crc32(shapes.encode()), round(total, 4), round(mixed, 4)


def _generator(key: str) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(zlib.crc32(key.encode("utf-8")))


def _normal(key: str, shape: Shape) -> Tensor:
    return torch.randn(tuple(int(size) for size in shape), generator=_generator(key), dtype=torch.float32)

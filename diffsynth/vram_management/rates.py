"""How fast bytes travel and numbers are multiplied: what tells whether copies hide behind the compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from diffsynth.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a machine does. The defaults are those of a good desktop; measure for better ones."""

    copy_gbs: float = 25.0  # GB/s, pinned host memory to the device: PCIe 4.0 x16; 5.0 gives 50
    ring_gbs: float = 5.0  # GB/s, mapped file to the device through the ring: an NVMe disk of PCIe 4.0
    tflops: float = 150.0  # 1e12 operations/s in bfloat16: RTX 4090 130, A100 180, H100 650, all as measured

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ArgumentError(f"{field.name} is {value}; give a number above 0.")


DEFAULT_RATES = Rates()


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTSizes:
    """Sizes of a DiT on which memory and time depend."""

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    in_dim: int
    out_dim: int  # channels of the latent: 16, or 48 for the Wan2.2 VAE
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> DiTSizes:
        """Take them from plain sizes, as a checkpoint's header tells them; other keys are left alone."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in known})  # type: ignore[arg-type]

    @property
    def spatial_stride(self) -> int:
        """Pixels along an edge of a latent position: 16 with the 48 channels of the Wan2.2 VAE."""
        return 16 if self.out_dim == 48 else 8


def block_flops(dit: DiTSizes, *, tokens: int, context_tokens: int, keeps_keys: bool) -> int:
    """Operations of one block for one sample, a multiplication and an addition counted as two.

    Args:
        dit: its sizes.
        tokens: of the video.
        context_tokens: of text and image together.
        keeps_keys: whether keys and values of text and image are there already.

    Source: q, k, v, o of self-attention, q and o of cross-attention, two layers of the feed-forward; twice
    tokens x keys x width for each attention.
    """
    linear = 2 * tokens * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)
    keys = 0 if keeps_keys else 4 * context_tokens * dit.dim**2
    return linear + keys + 4 * tokens * dit.dim * (tokens + context_tokens)

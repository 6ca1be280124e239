"""The speed adapter (motion controller) of Wan2.1-1.3b-speedcontrol-v1: three layers on one number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.conditioning.speed import Speed
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.ops.fused import linear_float32

if TYPE_CHECKING:
    from diffsynth.models.wan.dit import WanDiT
    from diffsynth.sampling.step import Step

TIMES_PER_BUCKET = 10  # a bucket's number in the units of the time embedding


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """Sizes of the speed adapter."""

    dim: int  # width of the DiT
    freq_dim: int = 256  # of the number's sinusoids


class SpeedAdapter(DiTAdapter):
    """Adds an embedding of the speed to the time modulation of every block, not to that of the head.

    Source: DiffSynth-Studio v1 ``models/wan_video_motion_controller.py``. Angles are float64 and the layers
    float32 whatever the weights' dtype; there, numbers were rounded to the weights' dtype first.
    """

    name = "speed"

    def __init__(self, config: SpeedConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.linear = nn.Sequential(
            nn.Linear(config.freq_dim, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, 6 * dim),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> SpeedAdapter:
        """Build from plain sizes, as a checkpoint's header tells them."""
        return cls(SpeedConfig(dim=cast("int", config["dim"]), freq_dim=cast("int", config["freq_dim"])))

    def embedding(self, motion_bucket_id: Tensor) -> Tensor:
        """Numbers (B,) -> what is added to the six modulations, (B, 6 D) float32."""
        half = self.config.freq_dim // 2
        times = motion_bucket_id.detach().to("cpu", torch.float64) * TIMES_PER_BUCKET
        angles = times[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        rise, _, middle, _, fall = cast("tuple[nn.Linear, ...]", tuple(self.linear))
        x = torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(rise.weight.device)
        for layer in (rise, middle):
            x = F.silu(linear_float32(x, layer.weight, layer.bias))
        return linear_float32(x, fall.weight, fall.bias)

    def prepare(self, given: object, dit: WanDiT) -> object:
        """What is added to the six modulations, (B, 1, 6, D)."""
        assert isinstance(given, Speed)
        return self.embedding(given.motion_bucket_id).view(-1, 1, 6, self.config.dim)

    def modulate(self, t_mod: Tensor, memory: object, step: Step | None = None) -> Tensor:
        assert isinstance(memory, Tensor)
        return t_mod + memory.to(t_mod)

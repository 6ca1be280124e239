"""The camera adapter of Fun Control-Camera: the rays of a moving camera, added to the patches.

Letters: B batch, T latent frames, H W height and width in pixels, f h w the video in patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.conditioning.camera import CameraPath, CameraRays
from diffsynth.errors import ArgumentError, ConfigurationError
from diffsynth.models.wan.adapters.adapter import DiTAdapter

if TYPE_CHECKING:
    from diffsynth.models.wan.dit_config import DiTConfig
    from diffsynth.sampling.step import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraConfig:
    """Sizes of the camera adapter."""

    dim: int  # width of the DiT
    in_dim: int = 24  # numbers of a pixel: six of its ray, for four frames
    downscale: int = 8  # pixels of a latent position; 16 with the Wan2.2 VAE
    kernel_size: tuple[int, int] = (2, 2)  # latent rows and columns of one token
    num_residual_blocks: int = 1


class ResidualBlock(nn.Module):
    """x + conv(ReLU(conv(x))), (B, D, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))  # type: ignore[no-any-return]


class CameraEncoder(nn.Module):
    """Rays of one latent frame (B, 24, H, W) -> what is added to its patches, (B, D, h, w)."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.downscale = config.downscale
        folded = config.in_dim * config.downscale**2
        self.conv = nn.Conv2d(folded, config.dim, config.kernel_size, stride=config.kernel_size)
        self.residual_blocks = nn.Sequential(
            *(ResidualBlock(config.dim) for _ in range(config.num_residual_blocks))
        )

    def forward(self, rays: Tensor) -> Tensor:
        x = self.conv(F.pixel_unshuffle(rays, self.downscale))
        return self.residual_blocks(x)  # type: ignore[no-any-return]


class CameraAdapter(DiTAdapter):
    """Adds the camera's rays to the patches, before they become a sequence.

    Source: wan_numerics 10.4; DiffSynth-Studio ``models/wan_video_camera_controller.py``.
    """

    name = "camera"

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.config = config
        self.control_adapter = CameraEncoder(config)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> CameraAdapter:
        """Build from plain sizes, as a checkpoint's header tells them."""
        rows, columns = cast("tuple[int, int]", config["kernel_size"])
        sizes = {
            name: cast("int", config[name]) for name in ("dim", "in_dim", "downscale", "num_residual_blocks")
        }
        return cls(CameraConfig(**sizes, kernel_size=(rows, columns)))

    def join(self, dit: DiTConfig) -> None:
        if self.config.kernel_size != dit.patch_size[1:]:
            raise ConfigurationError(
                f"The camera adapter makes tokens of {self.config.kernel_size} latent positions and its DiT "
                f"of {dit.patch_size[1:]}; load the pair that belongs together."
            )

    def embed(self, grid: Tensor, memory: object, step: Step | None = None) -> Tensor:
        """Rays frame by frame: all at once would be the largest tensor of the call.

        Outside of training ``grid`` is changed in place: it is as large as the whole sequence.
        """
        assert isinstance(memory, CameraPath | CameraRays)
        frames, *size = grid.shape[2:]
        pixels = [n * k * self.config.downscale for n, k in zip(size, self.config.kernel_size, strict=True)]
        if memory.shape != (self.config.in_dim, frames, *pixels):
            raise ArgumentError(
                f"the camera's rays have shape {memory.shape}; expected ({self.config.in_dim}, {frames}, "
                f"{pixels[0]}, {pixels[1]}), the length and size of the video."
            )
        added = (
            self.control_adapter(memory.latent_frame(index).to(grid.device, grid.dtype))
            for index in range(frames)
        )
        if torch.is_grad_enabled():
            return grid + torch.stack(list(added), dim=2)
        for index, one in enumerate(added):
            grid[:, :, index] += one
        return grid

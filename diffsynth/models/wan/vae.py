"""The video VAE of Wan2.1: 8 x 8 pixels and 4 frames become one latent position of 16 channels.

Source: Wan2.1 ``wan/modules/vae.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from diffsynth.models.wan.vae_coding import CausalVAE, Decoder, Encoder, known_sizes, residual_blocks
from diffsynth.models.wan.vae_layers import Downsample, Upsample

# Statistics of the released VAE's latents, channel by channel.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
SPATIAL_STRIDE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Sizes of a Wan2.1 VAE, told by the file's shapes, and the statistics of its latents."""

    dim: int = 96  # channels at full resolution
    z_dim: int = 16  # latent channels
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, as multiples of dim
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # which of the three halvings also halve time
    latents_mean: tuple[float, ...] = LATENT_MEAN  # by channel; diffusers' config.json may tell others
    latents_std: tuple[float, ...] = LATENT_STD


def encoder_stages(config: VAEConfig) -> list[nn.Module]:
    """Layers from the full resolution to the latent's, all stages in one list."""
    widths = [config.dim * m for m in (1, *config.dim_mult)]
    layers: list[nn.Module] = []
    for level, (in_channels, out_channels) in enumerate(pairwise(widths)):
        layers += residual_blocks(in_channels, out_channels, config.num_res_blocks)
        if level < len(config.temporal_downsample):
            layers.append(Downsample(out_channels, temporal=config.temporal_downsample[level]))
    return layers


def decoder_stages(config: VAEConfig) -> list[nn.Module]:
    """Layers from the latent's resolution to the full one, all stages in one list."""
    widths = [config.dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    temporal_upsample = tuple(reversed(config.temporal_downsample))
    layers: list[nn.Module] = []
    for level, (in_channels, out_channels) in enumerate(pairwise(widths)):
        # All levels but the first receive what the upsampling before them left: half the channels.
        received = in_channels if level == 0 else in_channels // 2
        layers += residual_blocks(received, out_channels, config.num_res_blocks + 1)
        if level < len(temporal_upsample):
            layers.append(Upsample(out_channels, out_channels // 2, temporal=temporal_upsample[level]))
    return layers


class WanVideoVAE(CausalVAE):
    """Encoder and decoder with the latent's normalisation; see `CausalVAE`."""

    released_statistics = (LATENT_MEAN, LATENT_STD)
    spatial_stride = SPATIAL_STRIDE

    def __init__(self, config: VAEConfig | None = None) -> None:
        config = config or VAEConfig()
        first, deepest = config.dim * config.dim_mult[0], config.dim * config.dim_mult[-1]
        super().__init__(
            Encoder(3, encoder_stages(config), (config.dim, deepest), config.z_dim),
            Decoder(config.z_dim, decoder_stages(config), (deepest, first), 3),
            config.z_dim,
            config.latents_mean,
            config.latents_std,
        )
        self.config = config

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> WanVideoVAE:
        """Build from plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
        return cls(VAEConfig(**known_sizes(VAEConfig, config)))  # type: ignore[arg-type]

"""The video VAE of Wan2.2: 16 x 16 pixels and 4 frames become one latent position of 48 channels.

It sees pixels in patches of 2 x 2, and each of its stages has a shortcut without weights around it: means of
neighbours on the way down, repeated values on the way up. Everything else is that of the Wan2.1 VAE.

Letters: B batch, C channels, F frames of this chunk, H W height and width.
Source: Wan2.2 ``wan/modules/vae2_2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.models.wan.vae_coding import CausalVAE, Decoder, Encoder, known_sizes, residual_blocks
from diffsynth.models.wan.vae_layers import Downsample, History, Upsample, channels_last

# Statistics of the released VAE's latents, channel by channel.
LATENT_MEAN = (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
               -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
               -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
               -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
               -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
               0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)  # fmt: skip
LATENT_STD = (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
              0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
              0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
              0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
              0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
              0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)  # fmt: skip
PATCH = 2  # pixels along an edge of a patch
PATCH_CHANNELS = 3 * PATCH**2
SPATIAL_STRIDE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class VAE22Config:
    """Sizes of a Wan2.2 VAE, told by the file's shapes, and the statistics of its latents."""

    dim: int = 160  # channels of the encoder at full resolution
    dec_dim: int = 256  # channels of the decoder at full resolution
    z_dim: int = 48  # latent channels
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, as multiples of dim or dec_dim
    num_res_blocks: int = 2  # per stage in the encoder; the decoder has one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # which of the three halvings also halve time
    latents_mean: tuple[float, ...] = LATENT_MEAN  # by channel; diffusers' config.json may tell others
    latents_std: tuple[float, ...] = LATENT_STD


class DownStage(nn.Module):
    """Residual blocks, perhaps a halving, and the means of the input's neighbours beside them.

    ``temporal``: whether the halving also halves time; None: no halving.
    """

    def __init__(self, in_channels: int, out_channels: int, count: int, *, temporal: bool | None) -> None:
        super().__init__()
        layers = residual_blocks(in_channels, out_channels, count)
        if temporal is not None:
            layers.append(Downsample(out_channels, temporal=temporal))
        self.downsamples = nn.ModuleList(layers)
        self.out_channels = out_channels
        self.shrinks = (2 if temporal else 1, 1 if temporal is None else 2)  # in time and along edges

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, history)
        return y + mean_of_neighbours(x, self.out_channels, *self.shrinks)


class UpStage(nn.Module):
    """Residual blocks, a doubling, and the input's repeated values beside them.

    ``temporal``: whether the doubling also doubles time.
    """

    def __init__(self, in_channels: int, out_channels: int, count: int, *, temporal: bool) -> None:
        super().__init__()
        blocks = residual_blocks(in_channels, out_channels, count)
        self.upsamples = nn.ModuleList([*blocks, Upsample(out_channels, out_channels, temporal=temporal)])
        self.temporal = temporal

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, history)
        is_first = not history.seen(self)
        history.keep(self, None)
        return add_repeated(y, x, frames=2 if self.temporal else 1, is_first=is_first)


class LastStage(nn.Module):
    """Residual blocks alone, which `PatchDecoder` runs."""

    def __init__(self, in_channels: int, out_channels: int, count: int) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(residual_blocks(in_channels, out_channels, count))


def mean_of_neighbours(x: Tensor, out_channels: int, frames: int, edge: int) -> Tensor:
    """Gather ``frames`` x ``edge`` x ``edge`` neighbours as channels, and take means of groups of them.

    Args:
        x: (B, C, F, H, W); where ``frames`` does not divide F a frame of zeros stands before the clip, which
            only happens to its first chunk.
        out_channels: C'; divides C x frames x edge x edge.
        frames: neighbours in time.
        edge: neighbours along height and width.

    Returns:
        (B, C', F / frames rounded up, H / edge, W / edge), channels last.
    """
    if frames == edge == 1 and out_channels == x.shape[1]:
        return x
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % frames, 0))
    b, c, f, h, w = x.shape
    cells = x.movedim(1, -1).reshape(b, f // frames, frames, h // edge, edge, w // edge, edge, c)
    gathered = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(
        b, f // frames, h // edge, w // edge, out_channels, -1
    )
    return gathered.mean(dim=-1).movedim(-1, 1)


def add_repeated(y: Tensor, x: Tensor, *, frames: int, is_first: bool) -> Tensor:
    """Add to ``y``, in place, the values of ``x`` repeated over 2 x 2 pixels and ``frames`` frames.

    Channel k of x stands for a run of channels of (C', frames, 2, 2), taken as one axis: the widening repeats
    each channel as often as needed, and what results is unfolded into frames, rows and columns. It is added
    piece by piece, so that the unfolded copy is never there.

    Args:
        y: (B, C', F x frames, 2 H, 2 W), one frame fewer per doubling in the clip's first chunk.
        x: (B, C, F, H, W).
        frames: that one frame of ``x`` becomes.
        is_first: the clip's first frame becomes one frame.
    """
    out_channels = y.shape[1]
    repeats = out_channels * frames * 4 // x.shape[1]
    skipped = frames - 1 if is_first else 0
    channels = torch.arange(out_channels, device=x.device)
    for frame in range(frames):
        begin = 1 if frame < skipped else 0  # frames of x whose piece is left out
        target = y[:, :, begin * frames + frame - skipped :: frames]
        for corner in range(4):
            row, column = divmod(corner, 2)
            wanted = ((channels * frames + frame) * 4 + corner).div(repeats, rounding_mode="floor")
            piece = x[:, :, begin:] if x.shape[1] == out_channels else x[:, wanted, begin:]
            target[..., row::2, column::2] += piece
    return y


def patches(video: Tensor) -> Tensor:
    """(B, 3, F, H, W) -> (B, 12, F, H / 2, W / 2): of a patch, columns before rows before the next colour."""
    b, c, f, h, w = video.shape
    cells = video.reshape(b, c, f, h // PATCH, PATCH, w // PATCH, PATCH)
    return channels_last(cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3))


def pixels(x: Tensor) -> Tensor:
    """(B, 12, F, H, W) -> (B, 3, F, 2 H, 2 W), the way back from `patches`."""
    b, _, f, h, w = x.shape
    cells = x.reshape(b, 3, PATCH, PATCH, f, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return cells.reshape(b, 3, f, h * PATCH, w * PATCH)


class PatchEncoder(Encoder):
    """Video -> mean and log-variance, (B, 3, F, H, W) -> (B, 2 z_dim, T, H / 16, W / 16)."""

    def forward(self, x: Tensor, history: History) -> Tensor:
        return super().forward(patches(x), history)


class PatchDecoder(Decoder):
    """Latent -> video, (B, z_dim, T, h, w) -> (B, 3, F, 16 h, 16 w)."""

    def forward(self, x: Tensor, history: History) -> Tensor:
        return pixels(super().forward(x, history))

    def layers(self) -> tuple[nn.Module, ...]:
        # Blocks of the last stage one by one: nothing then holds its input, which is twice as wide as they.
        *stages, last = self.upsamples
        assert isinstance(last, LastStage)
        return (*self.middle, *stages, *last.upsamples)


def encoder_stages(config: VAE22Config) -> list[nn.Module]:
    """One module per stage, from the full resolution to the latent's."""
    widths = [config.dim * m for m in (1, *config.dim_mult)]
    temporal = (*config.temporal_downsample, None)
    return [
        DownStage(*pair, config.num_res_blocks, temporal=halving)
        for pair, halving in zip(pairwise(widths), temporal, strict=True)
    ]


def decoder_stages(config: VAE22Config) -> list[nn.Module]:
    """One module per stage, from the latent's resolution to the full one."""
    widths = [config.dec_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    *pairs, last = pairwise(widths)
    stages = [
        UpStage(*pair, config.num_res_blocks + 1, temporal=doubling)
        for pair, doubling in zip(pairs, reversed(config.temporal_downsample), strict=True)
    ]
    return [*stages, LastStage(*last, config.num_res_blocks + 1)]


class WanVideoVAE22(CausalVAE):
    """Encoder and decoder with the latent's normalisation; see `CausalVAE`."""

    released_statistics = (LATENT_MEAN, LATENT_STD)
    spatial_stride = SPATIAL_STRIDE

    def __init__(self, config: VAE22Config | None = None) -> None:
        config = config or VAE22Config()
        first, last = config.dim_mult[0], config.dim_mult[-1]
        super().__init__(
            PatchEncoder(
                PATCH_CHANNELS, encoder_stages(config), (config.dim, config.dim * last), config.z_dim
            ),
            PatchDecoder(
                config.z_dim, decoder_stages(config), (config.dec_dim * last, config.dec_dim * first),
                PATCH_CHANNELS,
            ),
            config.z_dim,
            config.latents_mean,
            config.latents_std,
        )  # fmt: skip
        self.config = config

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> WanVideoVAE22:
        """Build from plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
        return cls(VAE22Config(**known_sizes(VAE22Config, config)))  # type: ignore[arg-type]

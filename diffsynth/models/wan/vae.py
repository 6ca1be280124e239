"""The video VAE of Wan2.1: 8 x 8 pixels and 4 frames become one latent position of 16 channels.

Letters: B batch, F pixel frames, T = (F - 1) / 4 + 1 latent frames, H W pixels, h w latent positions (H / 8,
W / 8). The model is strictly causal in time, so a clip is coded in chunks of any length with the same
numbers; chunks keep memory flat, `History` keeps what the next chunk must know.

Source: Wan2.1 ``wan/modules/vae.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError
from diffsynth.models.wan.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    History,
    ResidualBlock,
    RMSNorm,
    Upsample,
    channels_last,
)
from diffsynth.ops.tiling import Tile, blend_mask, tile_starts

# Statistics of the released VAE's latents, channel by channel.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Sizes of a Wan2.1 VAE, all told by the file's shapes."""

    dim: int = 96  # channels at full resolution
    z_dim: int = 16  # latent channels
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, as multiples of dim
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # which of the three halvings also halve time

    def __post_init__(self) -> None:
        if self.z_dim != len(LATENT_MEAN):
            raise ArgumentError(
                f"z_dim is {self.z_dim}; the Wan2.1 VAE has {len(LATENT_MEAN)} latent channels."
            )


class Encoder(nn.Module):
    """Video -> mean and log-variance of the latent, (B, 3, F, H, W) -> (B, 2 z_dim, T, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], 3)
        layers: list[nn.Module] = []
        for level, (in_channels, out_channels) in enumerate(pairwise(widths)):
            layers += residual_blocks(in_channels, out_channels, config.num_res_blocks)
            if level < len(config.temporal_downsample):
                layers.append(Downsample(out_channels, temporal=config.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = middle_blocks(widths[-1])
        self.head = nn.ModuleList(
            [RMSNorm(widths[-1]), nn.SiLU(), CausalConv3d(widths[-1], config.z_dim * 2, 3)]
        )

    def forward(self, x: Tensor, history: History) -> Tensor:
        return run_levels(x, history, self.conv1, (*self.downsamples, *self.middle), self.head)


class Decoder(nn.Module):
    """Latent -> video, (B, z_dim, T, h, w) -> (B, 3, F, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        mult = config.dim_mult
        widths = [config.dim * m for m in (mult[-1], *reversed(mult))]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3)
        self.middle = middle_blocks(widths[0])
        layers: list[nn.Module] = []
        temporal_upsample = tuple(reversed(config.temporal_downsample))
        for level, (in_channels, out_channels) in enumerate(pairwise(widths)):
            # All levels but the first receive what the upsampling before them left: half the channels.
            received = in_channels if level == 0 else in_channels // 2
            layers += residual_blocks(received, out_channels, config.num_res_blocks + 1)
            if level < len(temporal_upsample):
                layers.append(Upsample(out_channels, out_channels // 2, temporal=temporal_upsample[level]))
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleList([RMSNorm(widths[-1]), nn.SiLU(), CausalConv3d(widths[-1], 3, 3)])

    def forward(self, x: Tensor, history: History) -> Tensor:
        return run_levels(x, history, self.conv1, (*self.middle, *self.upsamples), self.head)


def residual_blocks(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """``count`` blocks, the first of which changes the width."""
    return [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(count)]


def middle_blocks(channels: int) -> nn.ModuleList:
    """The blocks at the lowest resolution: the only ones with attention."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


def run_levels(
    x: Tensor, history: History, entry: CausalConv3d, layers: tuple[nn.Module, ...], head: nn.ModuleList
) -> Tensor:
    """One chunk through a coder."""
    x = entry(x, history)
    for layer in layers:
        x = layer(x, history)
    norm, activation, conv = head
    return conv(norm(x, activation), history)  # type: ignore[no-any-return]


class WanVideoVAE(nn.Module):
    """Encoder and decoder with the latent's normalisation."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or VAEConfig()
        z_dim = self.config.z_dim
        self.encoder = Encoder(self.config)
        self.conv1 = CausalConv3d(z_dim * 2, z_dim * 2, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(self.config)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> WanVideoVAE:
        """Build from plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
        names = {f.name for f in fields(VAEConfig)}
        return cls(VAEConfig(**{k: v for k, v in config.items() if k in names}))  # type: ignore[arg-type]

    z_dim = property(lambda self: self.config.z_dim)
    temporal_stride = TEMPORAL_STRIDE
    spatial_stride = SPATIAL_STRIDE

    def encode(
        self,
        video: Tensor,
        *,
        normalise: bool = True,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
        chunk_frames: int = 4,
    ) -> Tensor:
        """Return the mean of the latent, fp32.

        Args:
            video: (B, 3, F, H, W) in [-1, 1]; F = 4 k + 1, H and W multiples of 8.
            normalise: subtract the latent's mean and divide by its deviation, channel by channel.
            tile_size: height and width of a tile in latent positions; None codes the whole picture.
            tile_stride: distance between tiles, at most ``tile_size``; the rest is overlap, blended.
            chunk_frames: frames coded at a time after the first, a multiple of 4; changes memory, not
                numbers.

        Returns:
            (B, z_dim, T, H / 8, W / 8) float32.
        """
        check_video_shape(video)
        if tile_size is None:
            latents = torch.cat(list(self._encode_chunks(video, chunk_frames)), dim=2)
        else:
            tiles = _tiles(
                video.shape[3] // SPATIAL_STRIDE, video.shape[4] // SPATIAL_STRIDE, tile_size, tile_stride
            )
            coded = (
                (t, torch.cat(list(self._encode_chunks(t.cut(video, SPATIAL_STRIDE), chunk_frames)), dim=2))
                for t in tiles
            )
            latents = _blend(
                coded, (video.shape[3] // SPATIAL_STRIDE, video.shape[4] // SPATIAL_STRIDE), scale=1
            )
        if normalise:
            mean, std = self._statistics(latents.device)
            latents = (latents - mean) / std
        return latents

    def decode(
        self,
        latents: Tensor,
        *,
        normalise: bool = True,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
        chunk_latents: int = 1,
    ) -> Tensor:
        """Return the video, fp32, not clamped; a tiled decode is clamped to [-1, 1], as DiffSynth did.

        Args:
            latents: (B, z_dim, T, h, w).
            normalise: the latents are normalised; undo it first.
            tile_size: height and width of a tile in latent positions; None decodes the whole picture.
            tile_stride: distance between tiles, at most ``tile_size``; the rest is overlap, blended.
            chunk_latents: latent frames decoded at a time; changes memory, not numbers.

        Returns:
            (B, 3, 4 (T - 1) + 1, 8 h, 8 w) float32.
        """
        if tile_size is None:
            chunks = self.decode_stream(latents, normalise=normalise, chunk_latents=chunk_latents)
            return torch.cat(list(chunks), dim=2)
        size = (latents.shape[3], latents.shape[4])
        decoded = (
            (
                t,
                torch.cat(
                    list(
                        self.decode_stream(t.cut(latents), normalise=normalise, chunk_latents=chunk_latents)
                    ),
                    dim=2,
                ),
            )
            for t in _tiles(*size, tile_size, tile_stride)
        )
        return _blend(
            decoded, (size[0] * SPATIAL_STRIDE, size[1] * SPATIAL_STRIDE), scale=SPATIAL_STRIDE
        ).clamp_(-1, 1)

    def decode_stream(
        self, latents: Tensor, *, normalise: bool = True, chunk_latents: int = 1
    ) -> Iterator[Tensor]:
        """Yield the video in chunks, (B, 3, f, H, W) float32, not clamped: memory stays flat."""
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise ArgumentError(
                f"latents have shape {tuple(latents.shape)}; expected (B, {self.config.z_dim}, T, h, w)."
            )
        if normalise:
            mean, std = self._statistics(latents.device)
            latents = latents.float() * std + mean
        history = History()
        for chunk in torch.split(latents, max(1, chunk_latents), dim=2):
            yield self.decoder(self.conv2(self._ready(chunk)), history).float()

    def _encode_chunks(self, video: Tensor, chunk_frames: int) -> Iterator[Tensor]:
        history = History()
        step = max(TEMPORAL_STRIDE, chunk_frames // TEMPORAL_STRIDE * TEMPORAL_STRIDE)
        later = torch.split(video[:, :, 1:], step, dim=2) if video.shape[2] > 1 else ()
        for chunk in (video[:, :, :1], *later):
            moments = self.conv1(self.encoder(self._ready(chunk), history))
            yield moments[:, : self.config.z_dim].float()

    def _ready(self, chunk: Tensor) -> Tensor:
        weight = self.conv1.weight
        return channels_last(chunk.to(weight.device, weight.dtype))

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Not buffers: a network built on meta would lose them.
        mean = torch.tensor(LATENT_MEAN, device=device).view(1, -1, 1, 1, 1)
        return mean, torch.tensor(LATENT_STD, device=device).view(1, -1, 1, 1, 1)


def check_video_shape(video: Tensor) -> None:
    """Raise ArgumentError unless the video is (B, 3, 4 k + 1, 8 h, 8 w)."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ArgumentError(f"video has shape {tuple(video.shape)}; expected (B, 3, F, H, W).")
    num_frames, height, width = video.shape[2:]
    if num_frames % TEMPORAL_STRIDE != 1:
        kept = (num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
        raise ArgumentError(
            f"video has {num_frames} frames; the VAE codes 4 k + 1. Cut it to {max(kept, 1)}."
        )
    if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
        raise ArgumentError(
            f"video is {height} x {width} pixels; the VAE needs multiples of {SPATIAL_STRIDE}."
        )


def _tiles(height: int, width: int, size: tuple[int, int], stride: tuple[int, int] | None) -> list[Tile]:
    rows, columns = (
        tile_starts(n, s, d) for n, s, d in zip((height, width), size, stride or size, strict=True)
    )
    return [Tile(top=r, left=c, height=min(size[0], height - r), width=min(size[1], width - c),
                 border=(size[0] - (stride or size)[0], size[1] - (stride or size)[1]),
                 picture=(height, width)) for r in rows for c in columns]  # fmt: skip


def _blend(coded: Iterator[tuple[Tile, Tensor]], size: tuple[int, int], *, scale: int) -> Tensor:
    """Weighted mean of overlapping tiles, accumulated in fp32 where the tiles are."""
    total = weight = None
    for tile, values in coded:
        mask = blend_mask(tile, scale=scale, device=values.device)
        if total is None:
            total = values.new_zeros(*values.shape[:3], *size)
            weight = values.new_zeros(1, 1, 1, *size)
        rows, columns = tile.region(scale)
        total[..., rows, columns] += values * mask
        weight[..., rows, columns] += mask  # type: ignore[index]
    assert total is not None and weight is not None
    return total.div_(weight)

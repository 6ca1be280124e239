"""What every causal video VAE of Wan does: code a clip in chunks, a picture in tiles, normalise the latent.

Letters: B batch, C latent channels, F pixel frames, T = (F - 1) / 4 + 1 latent frames, H W pixels, h w latent
positions; S pixels along an edge of a position (`CausalVAE.spatial_stride`). The networks are strictly causal
in time, so a clip is coded in chunks of any length with the same numbers; chunks keep memory flat, `History`
keeps what the next chunk must know.

Source: Wan2.1 ``wan/modules/vae.py``, Wan2.2 ``wan/modules/vae2_2.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError
from diffsynth.models.wan.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    History,
    ResidualBlock,
    RMSNorm,
    channels_last,
)
from diffsynth.ops.tiling import Tile, blend_mask, tile_starts
from diffsynth.video.lazy_video import LazyVideo

TEMPORAL_STRIDE = 4  # frames of a latent frame, except of the first, which is one frame


class Encoder(nn.Module):
    """Video -> mean and log-variance of the latent, (B, in_channels, F, H, W) -> (B, 2 z_dim, T, h, w).

    Args:
        in_channels: of a pixel, or of a patch of pixels.
        stages: layers from the full resolution to the latent's.
        widths: channels before the first stage and behind the last.
        z_dim: latent channels.
    """

    def __init__(
        self, in_channels: int, stages: Sequence[nn.Module], widths: tuple[int, int], z_dim: int
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, widths[0], 3)
        self.downsamples = nn.ModuleList(stages)
        self.middle = middle_blocks(widths[1])
        self.head = head_layers(widths[1], z_dim * 2)

    def forward(self, x: Tensor, history: History) -> Tensor:
        return run_levels(x, history, self.conv1, (*self.downsamples, *self.middle), self.head)


class Decoder(nn.Module):
    """Latent -> video, (B, z_dim, T, h, w) -> (B, out_channels, F, H, W).

    Args:
        z_dim: latent channels.
        stages: layers from the latent's resolution to the full one.
        widths: channels before the first stage and behind the last.
        out_channels: of a pixel, or of a patch of pixels.
    """

    def __init__(
        self, z_dim: int, stages: Sequence[nn.Module], widths: tuple[int, int], out_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(z_dim, widths[0], 3)
        self.middle = middle_blocks(widths[0])
        self.upsamples = nn.ModuleList(stages)
        self.head = head_layers(widths[1], out_channels)

    def forward(self, x: Tensor, history: History) -> Tensor:
        return run_levels(x, history, self.conv1, self.layers(), self.head)

    def layers(self) -> tuple[nn.Module, ...]:
        """Everything between entry and head, each with one input."""
        return (*self.middle, *self.upsamples)


def residual_blocks(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """``count`` blocks, the first of which changes the width."""
    return [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(count)]


def middle_blocks(channels: int) -> nn.ModuleList:
    """The blocks at the lowest resolution: the only ones with attention."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


def head_layers(channels: int, out_channels: int) -> nn.ModuleList:
    """What ends a coder."""
    return nn.ModuleList([RMSNorm(channels), nn.SiLU(), CausalConv3d(channels, out_channels, 3)])


def run_levels(
    x: Tensor, history: History, entry: CausalConv3d, layers: tuple[nn.Module, ...], head: nn.ModuleList
) -> Tensor:
    """One chunk through a coder."""
    x = entry(x, history)
    for layer in layers:
        x = layer(x, history)
    norm, activation, conv = cast("Any", head)
    x = norm(x, activation, conv.window(x, history))
    x = conv.slide(x, history)
    return x


def known_sizes(kind: type, config: Mapping[str, object]) -> dict[str, object]:
    """Of plain sizes, as a checkpoint's header tells them, those that are fields of ``kind``."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in config.items() if name in names}


class CausalVAE(nn.Module):
    """Encoder and decoder with the latent's normalisation; a VAE of its own says what they are made of.

    Args:
        encoder: of videos.
        decoder: of latents.
        z_dim: latent channels.
        mean: of the latents, channel by channel.
        std: the same.
    """

    released_statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]  # mean and std
    temporal_stride: int = TEMPORAL_STRIDE
    spatial_stride: int  # pixels along an edge of a latent position

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, z_dim: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        if not z_dim == len(mean) == len(std):
            raise ArgumentError(
                f"z_dim is {z_dim}, and the latents of {type(self).__name__} are normalised with {len(mean)} "
                f"means and {len(std)} deviations; give {z_dim} of both, as latents_mean and latents_std in "
                "the config.json beside the file."
            )
        self.latent_mean, self.latent_std = tuple(mean), tuple(std)
        self.z_dim = z_dim
        self.encoder = encoder
        self.conv1 = CausalConv3d(z_dim * 2, z_dim * 2, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = decoder

    @property
    def identity_beside_weights(self) -> bytes:
        """What changes latents and stands in no tensor: statistics other than the released ones."""
        statistics = (self.latent_mean, self.latent_std)
        return b"" if statistics == self.released_statistics else repr(statistics).encode()

    def encode(
        self,
        video: Tensor | LazyVideo,
        *,
        normalise: bool = True,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
        chunk_frames: int = 4,
    ) -> Tensor:
        """Return the mean of the latent, fp32.

        Args:
            video: (B, 3, F, H, W) in [-1, 1], or as bytes, on any device: frames go to that of the weights a
                chunk at a time, and are made then if it is lazy, except in tiles, which need all frames many
                times. F = 4 k + 1, H and W multiples of S.
            normalise: subtract the latent's mean and divide by its deviation, channel by channel.
            tile_size: height and width of a tile in latent positions; None codes the whole picture.
            tile_stride: distance between tiles, at most ``tile_size``; the rest is overlap, blended.
            chunk_frames: frames coded at a time after the first, a multiple of 4; changes memory, not
                numbers.

        Returns:
            (B, z_dim, T, H / S, W / S) float32.
        """
        check_video_shape(video, self.spatial_stride)
        if tile_size is None:
            latents = torch.cat(list(self._encode_chunks(video, chunk_frames)), dim=2)
        else:
            video = video.whole() if isinstance(video, LazyVideo) else video
            stride = self.spatial_stride
            size = (video.shape[3] // stride, video.shape[4] // stride)
            coded = (
                (t, torch.cat(list(self._encode_chunks(t.cut(video, stride), chunk_frames)), dim=2))
                for t in _tiles(*size, tile_size, tile_stride)
            )
            latents = _blend(coded, size, scale=1)
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
            (B, 3, 4 (T - 1) + 1, S h, S w) float32.
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
        scale = self.spatial_stride
        return _blend(decoded, (size[0] * scale, size[1] * scale), scale=scale).clamp_(-1, 1)

    def decode_stream(
        self, latents: Tensor, *, normalise: bool = True, chunk_latents: int = 1
    ) -> Iterator[Tensor]:
        """Yield the video in chunks, (B, 3, f, H, W) float32, not clamped: memory stays flat."""
        if latents.ndim != 5 or latents.shape[1] != self.z_dim:
            raise ArgumentError(
                f"latents have shape {tuple(latents.shape)}; expected (B, {self.z_dim}, T, h, w)."
            )
        if normalise:
            mean, std = self._statistics(latents.device)
            latents = latents.float() * std + mean
        history = History()
        for chunk in torch.split(latents, max(1, chunk_latents), dim=2):
            yield self.decoder(self.conv2(self._ready(chunk)), history).float()

    def _encode_chunks(self, video: Tensor | LazyVideo, chunk_frames: int) -> Iterator[Tensor]:
        history = History()
        step = max(TEMPORAL_STRIDE, chunk_frames // TEMPORAL_STRIDE * TEMPORAL_STRIDE)
        num_later = video.shape[2] - 1
        lengths = [1, *(min(step, num_later - begin) for begin in range(0, num_later, step))]
        chunks = video.chunks(lengths) if isinstance(video, LazyVideo) else torch.split(video, lengths, dim=2)
        for chunk in chunks:
            moments = self.conv1(self.encoder(self._ready(chunk), history))
            yield moments[:, : self.z_dim].float()

    def _ready(self, chunk: Tensor) -> Tensor:
        weight = self.conv1.weight
        chunk = chunk.to(weight.device)
        if chunk.dtype == torch.uint8:  # bytes travel and become numbers there, as in `frames_to_tensor`
            chunk = chunk.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
        return channels_last(chunk.to(weight.dtype))

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Not buffers: a network built on meta would lose them.
        mean, std = (torch.tensor(row, device=device) for row in (self.latent_mean, self.latent_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def check_video_shape(video: Tensor | LazyVideo, spatial_stride: int) -> None:
    """Raise ArgumentError unless the video is (B, 3, 4 k + 1, S h, S w)."""
    if len(video.shape) != 5 or video.shape[1] != 3:
        raise ArgumentError(f"video has shape {tuple(video.shape)}; expected (B, 3, F, H, W).")
    num_frames, height, width = video.shape[2:]
    if num_frames % TEMPORAL_STRIDE != 1:
        kept = (num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
        raise ArgumentError(
            f"video has {num_frames} frames; the VAE codes 4 k + 1. Cut it to {max(kept, 1)}."
        )
    if height % spatial_stride or width % spatial_stride:
        raise ArgumentError(
            f"video is {height} x {width} pixels; the VAE needs multiples of {spatial_stride}."
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

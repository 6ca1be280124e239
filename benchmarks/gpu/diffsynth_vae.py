"""A VAE decode as DiffSynth's pipeline does it by default: the baseline to beat, on the same weights.

Overlapping tiles of 30 x 52 latent positions every 15 x 26; each is decoded through the whole clip, one
latent frame at a time, the result growing by concatenation; tiles are blended on the CPU in the dtype of the
network. The decoder is the official one: plain layout, inputs padded and joined with their history by
copies, norms and activations apart.

Source of the behaviour: DiffSynth-Studio 1.1.7 and Wan2.1 ``wan/modules/vae.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.models.wan.vae import LATENT_MEAN, LATENT_STD, SPATIAL_STRIDE, WanVideoVAE
from diffsynth.models.wan.vae_layers import AttentionBlock, ResidualBlock, Upsample
from diffsynth.ops.tiling import Tile, blend_mask, tile_starts

TILE_SIZE, TILE_STRIDE = (30, 52), (15, 26)  # latent positions
PAST = 2  # frames that a layer remembers
Memory = dict[nn.Module, Tensor | None]


class TiledDecoder:
    """Decodes with the weights of ours.

    Args:
        ours: its layers are read for their weights alone.
        tile_size: latent positions.
        tile_stride: from one tile to the next.
    """

    def __init__(
        self,
        ours: WanVideoVAE,
        tile_size: tuple[int, int] = TILE_SIZE,
        tile_stride: tuple[int, int] = TILE_STRIDE,
    ) -> None:
        self._vae, self._size, self._stride = ours, tile_size, tile_stride

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (1, 16, T, h, w) on the device -> video (1, 3, F, H, W) on the CPU, clamped."""
        dtype = self._vae.conv2.weight.dtype
        frames, h, w = latents.shape[2:]
        size = (h * SPATIAL_STRIDE, w * SPATIAL_STRIDE)
        total = torch.zeros(1, 3, 4 * (frames - 1) + 1, *size, dtype=dtype)
        weight = torch.zeros(1, 1, total.shape[2], *size, dtype=dtype)
        for tile in self._tiles(h, w):
            values = self.decode(tile.cut(latents)).to("cpu")
            mask = blend_mask(tile, scale=SPATIAL_STRIDE, device="cpu").to(dtype)
            rows, columns = tile.region(SPATIAL_STRIDE)
            total[..., rows, columns] += values * mask
            weight[..., rows, columns] += mask
        return (total / weight).clamp_(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """The whole of a tile, frame by frame: (1, 3, F, H, W) in the network's dtype."""
        vae = self._vae
        dtype, device = vae.conv2.weight.dtype, latents.device
        mean, std = (
            torch.tensor(t, device=device, dtype=dtype).view(1, -1, 1, 1, 1)
            for t in (LATENT_MEAN, LATENT_STD)
        )
        z = F.conv3d((latents.to(dtype) * std + mean).contiguous(), vae.conv2.weight, vae.conv2.bias)
        memory: Memory = {}
        out = self._decode_frame(z[:, :, :1], memory)
        for index in range(1, z.shape[2]):
            out = torch.cat([out, self._decode_frame(z[:, :, index : index + 1], memory)], dim=2)
        return out

    def _tiles(self, h: int, w: int) -> list[Tile]:
        (th, tw), (sh, sw) = self._size, self._stride
        return [
            Tile(
                top=top,
                left=left,
                height=min(th, h - top),
                width=min(tw, w - left),
                border=(th - sh, tw - sw),
                picture=(h, w),
            )
            for top in tile_starts(h, th, sh)
            for left in tile_starts(w, tw, sw)
        ]

    def _decode_frame(self, x: Tensor, memory: Memory) -> Tensor:
        decoder = self._vae.decoder
        x = convolved(x.contiguous(), decoder.conv1, memory)
        for layer in (*decoder.middle, *decoder.upsamples):
            x = self._layer(x, layer, memory)
        norm, _, last = decoder.head
        return convolved(F.silu(normalised(x, norm.gamma)), last, memory)

    def _layer(self, x: Tensor, layer: nn.Module, memory: Memory) -> Tensor:
        if isinstance(layer, ResidualBlock):
            return residual(x, layer, memory)
        if isinstance(layer, AttentionBlock):
            return attention(x, layer)
        assert isinstance(layer, Upsample)
        return upsampled(x, layer, memory)


def convolved(x: Tensor, layer: nn.Conv3d, memory: Memory) -> Tensor:
    """A causal convolution: history joined by a copy, zeros put around by another."""
    past = memory.get(layer)
    memory[layer] = remembered(x, past)
    return padded_convolution(x, layer, past)


def remembered(x: Tensor, past: Tensor | None) -> Tensor:
    """The last frames of the input, with one of the history when the input is shorter."""
    last = x[:, :, -PAST:].clone()
    if last.shape[2] < PAST and past is not None:
        last = torch.cat([past[:, :, -1:], last], dim=2)
    return last


def padded_convolution(x: Tensor, layer: nn.Conv3d, past: Tensor | None) -> Tensor:
    front = layer.kernel_size[0] - 1
    if past is not None:
        x = torch.cat([past, x], dim=2)
        front -= past.shape[2]
    rows, columns = layer.kernel_size[1] // 2, layer.kernel_size[2] // 2
    return F.conv3d(F.pad(x, (columns, columns, rows, rows, front, 0)), layer.weight, layer.bias)


def normalised(x: Tensor, gamma: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma


def residual(x: Tensor, block: ResidualBlock, memory: Memory) -> Tensor:
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    shortcut = block.shortcut
    y = x if isinstance(shortcut, nn.Identity) else F.conv3d(x, shortcut.weight, shortcut.bias)  # type: ignore[arg-type]
    x = convolved(F.silu(normalised(x, norm1.gamma)), conv1, memory)
    x = convolved(F.silu(normalised(x, norm2.gamma)), conv2, memory)
    return x + y


def frames_of(x: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B F, C, H, W), contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def attention(x: Tensor, block: AttentionBlock) -> Tensor:
    frames = frames_of(x)
    n, c, h, w = frames.shape
    qkv = F.conv2d(normalised(frames, block.norm.gamma), block.to_qkv.weight, block.to_qkv.bias)
    q, k, v = qkv.view(n, 1, 3 * c, h * w).transpose(2, 3).contiguous().chunk(3, dim=-1)
    seen = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(n, c, h, w)
    seen = F.conv2d(seen, block.proj.weight, block.proj.bias)
    return x + seen.view(x.shape[0], -1, c, h, w).transpose(1, 2)


def upsampled(x: Tensor, layer: Upsample, memory: Memory) -> Tensor:
    if layer.temporal:
        x = doubled_frames(x, layer, memory)
    batch, frames = x.shape[0], frames_of(x)
    large = F.interpolate(frames.float(), scale_factor=2.0, mode="nearest-exact").to(x.dtype)
    conv = layer.resample[1]
    large = F.conv2d(large, conv.weight, conv.bias, padding=1)  # type: ignore[arg-type]
    return large.view(batch, -1, *large.shape[1:]).transpose(1, 2)


def doubled_frames(x: Tensor, layer: Upsample, memory: Memory) -> Tensor:
    if layer not in memory:
        memory[layer] = None  # the clip's first frame is not doubled, and later ones do not see it here
        return x
    past = memory[layer]
    last = x[:, :, -PAST:].clone()
    if last.shape[2] < PAST:
        before = torch.zeros_like(last) if past is None else past[:, :, -1:]
        last = torch.cat([before, last], dim=2)
    memory[layer] = last
    even, odd = padded_convolution(x, layer.time_conv, past).chunk(2, dim=1)
    return torch.stack([even, odd], dim=3).flatten(2, 3)

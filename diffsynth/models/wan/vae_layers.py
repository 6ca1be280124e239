"""Layers of the causal video VAE, and what one chunk of a clip leaves behind for the next.

Letters: B batch, C channels, F frames of this chunk, H W height and width.
Every layer is causal in time: a frame sees itself and frames before it. A clip may therefore be cut into
chunks of any length; `History` carries the last input frames of each temporal layer from chunk to chunk.
Activations travel channels-last (NDHWC in memory): frames are then contiguous, so that joining history and
chunk is one plain copy and folding frames into the batch costs nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class History:
    """The last input frames of each temporal layer, keyed by the layer; one per pass over a clip or tile."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor | None] = {}

    def seen(self, layer: nn.Module) -> bool:
        """Whether an earlier chunk went through this layer."""
        return layer in self._frames

    def recall(self, layer: nn.Module) -> Tensor | None:
        """The frames that ``layer`` kept, (B, C, n, H, W), or None for "before the clip": zeros."""
        return self._frames.get(layer)

    def keep(self, layer: nn.Module, frames: Tensor | None) -> None:
        """Store the frames; a clone, so that the chunk they were cut from can be freed."""
        self._frames[layer] = None if frames is None else frames.clone()


class CausalConv3d(nn.Conv3d):
    """A convolution over (frames, height, width) that looks only back in time."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int]) -> None:
        kernel = (kernel, kernel, kernel) if isinstance(kernel, int) else kernel
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """(B, C, F, H, W) -> (B, C', F, H, W). Kernels longer than one frame need ``history``."""
        num_past = self.kernel_size[0] - 1
        if num_past == 0 or history is None:
            return super().forward(x)
        past = history.recall(self)
        if past is None and x.shape[2] == 1:
            # Before the clip there are zeros: only the last tap of the kernel meets a frame. A third of the
            # work.
            history.keep(self, x)
            first = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])  # type: ignore[arg-type]
            return first.unsqueeze(2)
        missing = num_past - (0 if past is None else past.shape[2])
        pieces = [x.new_zeros(*x.shape[:2], missing, *x.shape[3:])] if missing else []
        joined = torch.cat([*pieces, *(() if past is None else (past,)), x], dim=2)
        history.keep(self, joined[:, :, -num_past:])
        return super().forward(joined)


class RMSNorm(nn.Module):
    """Each position divided by the length of its channel vector, times sqrt(C) and gamma."""

    def __init__(self, channels: int, num_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * num_dims))

    def forward(self, x: Tensor) -> Tensor:
        # Channels last in the view as in memory: a reduction over the innermost axis is several times faster.
        vectors = x.movedim(1, -1)
        length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
        scaled = vectors / length * (self.gamma.flatten() * math.sqrt(x.shape[1]))
        moved: Tensor = scaled.movedim(-1, 1)
        return moved


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input. Names count as in the official file."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleList(
            [
                RMSNorm(in_channels),
                nn.SiLU(),
                CausalConv3d(in_channels, out_channels, 3),
                RMSNorm(out_channels),
                nn.SiLU(),
                nn.Identity(),  # dropout of the training code: keeps the official numbering
                CausalConv3d(out_channels, out_channels, 3),
            ]
        )
        self.shortcut = (
            CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor, history: History) -> Tensor:
        norm1, act1, conv1, norm2, act2, _, conv2 = self.residual
        y = conv1(act1(norm1(x)), history)
        y = conv2(act2(norm2(y)), history)
        return y + self.shortcut(x)  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Self-attention over the positions of each frame, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, num_dims=2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        frames = fold_frames(x)
        n, c, h, w = frames.shape
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        # One frame at a time: heads of 384 channels have no flash kernel, and the score matrix is (H W)^2.
        seen = [F.scaled_dot_product_attention(q[i], k[i], v[i]) for i in _one_by_one(n)]
        out = torch.cat(seen).transpose(1, 2).reshape(n, c, h, w)
        return x + unfold_frames(self.proj(out), x.shape[0])


def _one_by_one(count: int) -> list[slice]:
    return [slice(i, i + 1) for i in range(count)]


class Downsample(nn.Module):
    """Half the height and width; with ``temporal`` also the frames (the clip's first stays alone)."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleList(
            [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)]
        )
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, history: History) -> Tensor:
        pad, conv = self.resample
        x = unfold_frames(conv(pad(fold_frames(x))), x.shape[0])
        if not self.temporal:
            return x
        past = history.recall(self)
        history.keep(self, x[:, :, -1:])
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))  # type: ignore[no-any-return]
        first = x[:, :, :1]
        return torch.cat([first, self.time_conv(x)], dim=2) if x.shape[2] > 1 else first


class Upsample(nn.Module):
    """Twice the height and width; with ``temporal`` also the frames (the clip's first stays alone)."""

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(in_channels, out_channels, 3, padding=1)])
        if temporal:
            self.time_conv = CausalConv3d(in_channels, in_channels * 2, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, history: History) -> Tensor:
        if self.temporal:
            x = self._double_frames(x, history)
        frames = F.interpolate(fold_frames(x), scale_factor=2.0, mode="nearest-exact")
        return unfold_frames(self.resample[1](frames), x.shape[0])

    def _double_frames(self, x: Tensor, history: History) -> Tensor:
        alone = []
        if not history.seen(self):
            # The clip's first frame is not doubled, and the frames after it do not see it here: zeros stand
            # before them.
            history.keep(self, None)
            alone, x = [x[:, :, :1]], x[:, :, 1:]
            if x.shape[2] == 0:
                return alone[0]
        even, odd = self.time_conv(x, history).chunk(2, dim=1)
        doubled = torch.stack([even, odd], dim=3).flatten(2, 3)
        return torch.cat([*alone, doubled], dim=2) if alone else doubled


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B F, C, H, W); a view when x is channels-last."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_frames(x: Tensor, batch: int) -> Tensor:
    """(B F, C, H, W) -> (B, C, F, H, W)."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)

"""Layers of the causal video VAE, and what one chunk of a clip leaves behind for the next.

Letters: B batch, C channels, F frames of this chunk, H W height and width.
Every layer is causal in time: a frame sees itself and frames before it. A clip may therefore be cut into
chunks of any length; `History` carries the last input frames of each temporal layer from chunk to chunk.
Activations travel channels-last (NDHWC in memory): frames are then contiguous, so that folding frames into
the batch costs nothing. What a convolution over time reads is made where it is read, in a window behind the
frames before it, so that nothing has to be joined.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.ops.attention import attend

PIECE_BYTES = 1 << 20  # float32 bytes worked on at a time: about half of a core's second-level cache
TINY = 1e-12  # the shortest length that a vector is divided by
# From PyTorch 2.9 on a GPU; before, `F.rms_norm` was several kernels with float32 copies.
HAS_RMS_KERNEL = hasattr(torch.ops.aten, "_fused_rms_norm_backward")
ONEDNN_FROM = 20480  # channels x frames x height of one sample: PyTorch itself asks oneDNN above it alone


class History:
    """The last input frames of each temporal layer, keyed by the layer; one per pass over a clip or tile."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor | None] = {}

    def seen(self, layer: nn.Module) -> bool:
        """Whether an earlier chunk went through this layer."""
        return layer in self._frames

    def take(self, layer: nn.Module) -> Tensor | None:
        """Give back the frames that ``layer`` kept, (B, C, n, H, W); None before the clip's first chunk."""
        return self._frames.pop(layer, None)

    def keep(self, layer: nn.Module, frames: Tensor | None) -> None:
        """Store the frames; a clone, so that the chunk they were cut from can be freed."""
        self._frames[layer] = None if frames is None else frames.clone(memory_format=torch.channels_last_3d)


class CausalConv3d(nn.Conv3d):
    """A convolution over (frames, height, width) that looks only back in time."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int]) -> None:
        kernel = (kernel, kernel, kernel) if isinstance(kernel, int) else kernel
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """(B, C, F, H, W) -> (B, C', F, H, W). Kernels longer than one frame need ``history``."""
        if self.kernel_size[0] == 1 or history is None:
            return channels_last(super().forward(x))
        window = self.window(x, history)
        if window is not None:
            window[:, :, -x.shape[2] :] = x
        return self.slide(x if window is None else window, history)

    def window(self, x: Tensor, history: History) -> Tensor | None:
        """Return memory for a chunk of the shape of x behind the two frames before it, which are there.

        Returns:
            (B, C, 2 + F, H, W), whose last F frames are to be written; None where the chunk is the clip's
            first frame, which stands alone.
        """
        past = history.take(self)
        if past is None and x.shape[2] == 1:
            return None
        b, c, num_frames, h, w = x.shape
        num_past, num_kept = self.kernel_size[0] - 1, 0 if past is None else past.shape[2]
        shape = (b, c, num_past + num_frames, h, w)
        # As x lies there: small convolutions on a CPU give the plain layout back.
        is_last = x.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if is_last else torch.contiguous_format
        window = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        if num_kept < num_past:
            window[:, :, : num_past - num_kept] = 0  # before the clip
        if past is not None:
            window[:, :, num_past - num_kept : num_past] = past
        return window

    def slide(self, window: Tensor, history: History) -> Tensor:
        """Convolve a filled `window`, or a first frame: -> (B, C', F, H, W)."""
        num_past = self.kernel_size[0] - 1
        history.keep(self, window[:, :, -num_past:])
        if window.shape[2] == 1:
            # Before the clip there are zeros: only the last tap of the kernel meets a frame. A third of the
            # work.
            first = F.conv2d(window[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return channels_last(first.unsqueeze(2))
        # PyTorch gives small convolutions of one sample back in the plain layout, whatever it was given.
        return channels_last(super().forward(window))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As Conv3d; small inputs on a CPU too go through oneDNN.

        PyTorch has a plain loop for one float32 sample of few channels, 20 times as slow.
        """
        is_left_out = x.shape[0] == 1 and x.shape[1:4].numel() <= ONEDNN_FROM and x.dtype == torch.float32
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if is_left_out and has_onednn and x.device.type == "cpu":
            padding = cast("tuple[int, ...]", self.padding)
            made: Tensor = torch.mkldnn_convolution(
                x, weight, bias, padding, self.stride, self.dilation, self.groups
            )
        else:
            made = super()._conv_forward(x, weight, bias)
        return made


class RMSNorm(nn.Module):
    """Each position divided by the length of its channel vector, times sqrt(C) and gamma; perhaps SiLU."""

    def __init__(self, channels: int, num_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * num_dims))

    def forward(self, x: Tensor, activation: nn.Module | None = None, window: Tensor | None = None) -> Tensor:
        """(B, C, ...) -> the same shape; ``activation`` is applied to the result.

        With a `CausalConv3d.window` it becomes the last frames of that, and all of the window is returned.
        """
        # Channels last in the view as in memory: a reduction over the innermost axis is several times faster.
        vectors, gamma = x.movedim(1, -1), self.gamma.flatten()
        into = None if window is None else window[:, :, -x.shape[2] :].movedim(1, -1)
        if torch.is_grad_enabled() or not vectors.is_contiguous():
            scaled = vectors / lengths(vectors) * (gamma * math.sqrt(x.shape[1]))
            scaled = scaled if activation is None else activation(scaled)
            scaled = scaled if into is None else into.copy_(scaled)
        else:
            scaled = torch.empty(vectors.shape, dtype=x.dtype, device=x.device) if into is None else into
            normalise = normalise_in_pieces if x.device.type == "cpu" else normalise_whole
            normalise(vectors, scaled, gamma, activation is not None)
        return scaled.movedim(-1, 1) if window is None else window


def lengths(vectors: Tensor) -> Tensor:
    """(..., C) -> (..., 1), above 0."""
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return norm.clamp_min(TINY)


def normalise_in_pieces(vectors: Tensor, out: Tensor, gamma: Tensor, has_silu: bool) -> None:
    """The norm of contiguous vectors (..., C), float32 inside, in pieces that stay in a CPU core's cache."""
    width = vectors.shape[-1]
    gain = (gamma * math.sqrt(width)).float()
    for sample, made in zip(vectors, out, strict=True):
        rows = (torch.split(t.view(-1, width), PIECE_BYTES // (4 * width)) for t in (sample, made))
        for source, target in zip(*rows, strict=True):
            piece = source.float()
            # Not in place: a float32 piece is its own source.
            piece = piece * lengths(piece).reciprocal_()
            piece *= gain
            target.copy_(F.silu(piece, inplace=True) if has_silu else piece)


def normalise_whole(vectors: Tensor, out: Tensor, gamma: Tensor, has_silu: bool) -> None:
    """The norm of contiguous vectors (..., C) on a GPU, in one pass where torch has a kernel for it."""
    width = vectors.shape[-1]
    if HAS_RMS_KERNEL:
        scaled = F.rms_norm(vectors, (width,), gamma, TINY**2 / width)
    else:
        scaled = torch.div(vectors, lengths(vectors), out=out).mul_(gamma * math.sqrt(width))
    if has_silu:
        torch.ops.aten.silu.out(scaled, out=out)
    else:
        out.copy_(scaled)


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
        norm1, act1, conv1, norm2, act2, _, conv2 = cast("Any", self.residual)
        y: Tensor = conv1.slide(norm1(x, act1, conv1.window(x, history)), history)
        y = norm2(y, act2, conv2.window(y, history))  # what it is made of is not there beside the next result
        y = conv2.slide(y, history)
        y += self.shortcut(x)
        return y


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
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(2)
        q, k, v = qkv.chunk(3, dim=-1)  # (n, H W, one head, c)
        # One frame at a time: where heads of 384 channels have no fused kernel, scores are (H W)^2 numbers.
        seen = [attend(q[i], k[i], v[i]) for i in _one_by_one(n)]
        out = torch.cat(seen).view(n, h, w, c).movedim(-1, 1)
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
        past = history.take(self)
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
        frames, conv = fold_frames(x), cast("nn.Conv2d", self.resample[1])
        if torch.is_grad_enabled():
            return unfold_frames(
                conv(F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")), x.shape[0]
            )
        return unfold_frames(convolve_doubled(frames, conv.weight, conv.bias), x.shape[0])

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
        # Stacked behind the frames as they lie in memory: (B, T, 2, H, W, C).
        doubled = torch.stack([t.movedim(1, -1) for t in (even, odd)], dim=2).flatten(1, 2).movedim(-1, 1)
        return torch.cat([*alone, doubled], dim=2) if alone else doubled


def convolve_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Double x (N, C, H, W) by repeating pixels and convolve with weight (C', C, 3, 3): (N, C', 2 H, 2 W).

    A repeated pixel meets two or one taps of the kernel, so each of the four kinds of output pixel (even or
    odd row and column) is a 2 x 2 convolution of the small picture, with taps added up: 4 / 9 of the work.
    """
    rows = weight.float().unbind(2)
    by_row = [
        torch.stack(pair, dim=2) for pair in ((rows[0], rows[1] + rows[2]), (rows[0] + rows[1], rows[2]))
    ]
    kernels = []
    for part in by_row:
        columns = part.unbind(3)
        for pair in ((columns[0], columns[1] + columns[2]), (columns[0] + columns[1], columns[2])):
            kernels.append(torch.stack(pair, dim=3))
    joined = torch.cat(kernels).to(weight.dtype, memory_format=torch.channels_last)
    phases = F.conv2d(x, joined, None if bias is None else bias.repeat(4), padding=1).chunk(4, dim=1)
    n, _, h, w = x.shape
    out = torch.empty(
        n, weight.shape[0], 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    for index, phase in enumerate(phases):
        row, column = divmod(index, 2)
        out[:, :, row::2, column::2] = phase[:, :, row : row + h, column : column + w]
    return out


def channels_last(x: Tensor) -> Tensor:
    """(B, C, F, H, W) with the channels of a position side by side in memory."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B F, C, H, W); a view when x is channels-last."""
    if x.device.type == "cpu":
        return x.transpose(1, 2).flatten(0, 1)
    # With the channels behind meanwhile: else the strides of a single frame do not tell that it is
    # channels-last, and cuDNN works on a copy in the plain layout. On a CPU that layout stays: it decides in
    # which order products are summed there.
    return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def unfold_frames(x: Tensor, batch: int) -> Tensor:
    """(B F, C, H, W) -> (B, C, F, H, W); strides as in `fold_frames`."""
    if x.device.type == "cpu":
        return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)
    vectors = x.movedim(1, -1)
    return vectors.view(batch, -1, *vectors.shape[1:]).movedim(-1, 1)

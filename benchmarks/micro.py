"""Small experiments on a CPU: the same work written in several ways, so that a number can choose.

    python benchmarks/micro.py                        # all groups
    python benchmarks/micro.py conv norm --threads 1  # some

Groups: conv (causal 3D convolution of the VAE: layouts, folded into 2D), norm (RMS norm and SiLU of the
VAE), layer (the DiT's layer norm, piece sizes, gated add), attention (text keys with and without a bias),
linear (alignment of mapped weights, tokens per feed-forward chunk). The first form of a group is what the
package does; a ratio (peer / ours) below 1 says that another form is faster.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, interleaved, milliseconds, parser, report, set_threads
from diffsynth.models.wan.vae_layers import RMSNorm
from diffsynth.ops import fused

Forms = dict[str, Callable[[], object]]
BF16 = torch.bfloat16
# Channels, height, width and frames of a chunk where the decoder of a 480 x 832 video works.
PICTURES = ((384, 60, 104, 1), (384, 120, 208, 2), (192, 240, 416, 4), (96, 480, 832, 4))
LAST_3D, LAST_2D = torch.channels_last_3d, torch.channels_last


def compared(title: str, forms: Forms, repeats: int) -> list[Row]:
    """One row per form beside the first, which is the package's."""
    spent = interleaved(forms, repeats=repeats, warmup=2)
    first, *others = forms
    ours = milliseconds(spent[first])
    return [
        Row(
            figure=f"{title}: {first}",
            unit="ms",
            ours=ours,
            peer_name=other,
            peer=milliseconds(spent[other]),
            notes="the other is faster" if min(spent[other]) < 0.97 * min(spent[first]) else "",
        )
        for other in others
    ]


def conv_forms(channels: int, height: int, width: int, frames: int) -> Forms:
    """(1, C, frames + 2, H, W) with a kernel of 3 x 3 x 3, no padding in time."""
    x = torch.randn(1, channels, frames + 2, height, width).to(BF16)
    weight, bias = (
        (torch.randn(channels, channels, 3, 3, 3) / channels).to(BF16),
        torch.zeros(channels, dtype=BF16),
    )
    last_x, last_weight = x.contiguous(memory_format=LAST_3D), weight.contiguous(memory_format=LAST_3D)
    taps = [weight[:, :, t].contiguous(memory_format=LAST_2D) for t in range(3)]
    joined = torch.cat([weight[:, :, t] for t in range(3)], dim=1).contiguous(memory_format=LAST_2D)

    def conv3d(a: Tensor, w: Tensor) -> Tensor:
        return F.conv3d(a, w, bias, padding=(0, 1, 1))

    def folded_sum() -> Tensor:
        planes = last_x.transpose(1, 2).flatten(0, 1)
        parts = [
            F.conv2d(planes[t : t + frames], taps[t], bias if t == 0 else None, padding=1) for t in range(3)
        ]
        return parts[0].add_(parts[1]).add_(parts[2])

    def folded_join() -> Tensor:
        planes = last_x.transpose(1, 2).flatten(0, 1)
        wide = torch.cat([planes[t : t + frames] for t in range(3)], dim=1)
        return F.conv2d(wide, joined, bias, padding=1)

    return {
        "input channels-last, weights as loaded": lambda: conv3d(last_x, weight),
        "both channels-last": lambda: conv3d(last_x, last_weight),
        "both plain": lambda: conv3d(x, weight),
        "input plain, weights channels-last": lambda: conv3d(x, last_weight),
        "three 2D convolutions, summed": folded_sum,
        "one 2D convolution over joined frames": folded_join,
    }


def conv2d_forms(channels: int, height: int, width: int) -> Forms:
    x = torch.randn(4, channels, height, width).to(BF16).contiguous(memory_format=LAST_2D)
    weight = (torch.randn(channels // 2, channels, 3, 3) / channels).to(BF16)
    last, plain = weight.contiguous(memory_format=LAST_2D), x.contiguous()
    return {
        "input channels-last, weights as loaded": lambda: F.conv2d(x, weight, padding=1),
        "both channels-last": lambda: F.conv2d(x, last, padding=1),
        "both plain": lambda: F.conv2d(plain, weight, padding=1),
    }


def upsample_forms(channels: int, height: int, width: int) -> Forms:
    """Twice the size (nearest) and a 3 x 3 convolution; or four 2 x 2 convolutions before the doubling."""
    x = torch.randn(4, channels, height, width).to(BF16).contiguous(memory_format=LAST_2D)
    weight = (torch.randn(channels // 2, channels, 3, 3) / channels).to(BF16)
    # A doubled row meets two rows of the input: taps that meet the same row are added up beforehand.
    rows = [torch.stack([w[0], w[1] + w[2]]) for w in (weight.float().unbind(2),)]
    rows += [torch.stack([w[0] + w[1], w[2]]) for w in (weight.float().unbind(2),)]
    kernels = []
    for row in rows:  # (2, out, in, 3)
        left = torch.stack([row[..., 0], row[..., 1] + row[..., 2]], -1)
        right = torch.stack([row[..., 0] + row[..., 1], row[..., 2]], -1)
        kernels += [k.permute(1, 2, 0, 3).to(BF16).contiguous(memory_format=LAST_2D) for k in (left, right)]

    def phases() -> Tensor:
        size = (4, channels // 2, 2 * height, 2 * width)
        out = torch.empty(size, dtype=BF16, memory_format=LAST_2D)
        for index, kernel in enumerate(kernels):
            a, b = divmod(index, 2)
            part = F.conv2d(x, kernel, padding=1)
            out[:, :, a::2, b::2] = part[:, :, a : a + height, b : b + width]
        return out

    def doubled() -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), weight, padding=1)

    assert torch.dist(phases().float(), doubled().float()) < 0.02 * doubled().float().norm()
    return {"interpolate, 3 x 3": doubled, "four 2 x 2, interleaved": phases}


def norm_forms(channels: int, height: int, width: int, frames: int) -> Forms:
    x = torch.randn(1, channels, frames, height, width).to(BF16).contiguous(memory_format=LAST_3D)
    norm = RMSNorm(channels).to(BF16)
    gain = norm.gamma.flatten()
    wide_gain = gain.float() * math.sqrt(channels)

    def fused_norm(weight: Tensor) -> Tensor:
        return F.silu(F.rms_norm(x.movedim(1, -1), (channels,), weight, 1e-24), inplace=True).movedim(-1, 1)

    def by_hand(size: int) -> Tensor:
        flat = x.movedim(1, -1).reshape(-1, channels)
        out = torch.empty_like(flat)
        tokens = max(1, size // 4 // channels)
        for a, b in zip(flat.split(tokens), out.split(tokens), strict=True):
            part = a.float()
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True).clamp_min_(1e-12)
            b.copy_(F.silu(part.mul_(length.reciprocal_()).mul_(wide_gain), inplace=True))
        return out.view(1, frames, height, width, channels).movedim(-1, 1)

    def squares() -> Tensor:
        vectors = x.movedim(1, -1)
        length = vectors.float().square_().sum(-1, keepdim=True).sqrt_().clamp_min_(1e-12).to(BF16)
        return F.silu(vectors / length * (gain * math.sqrt(channels)), inplace=True).movedim(-1, 1)

    return {
        "RMSNorm, SiLU": lambda: F.silu(norm(x)),
        "RMSNorm, SiLU in place": lambda: F.silu(norm(x), inplace=True),
        "F.rms_norm, SiLU in place": lambda: fused_norm(gain),
        "length from float32 squares": squares,
        "float32 in pieces of 512 KiB": lambda: by_hand(512 << 10),
        "float32 in pieces of 1 MiB": lambda: by_hand(1 << 20),
        "float32 in pieces of 2 MiB": lambda: by_hand(2 << 20),
    }


def piece_forms(work: Callable[[], object]) -> Forms:
    """The same work with other sizes of a piece."""

    def sized(size: int) -> Callable[[], object]:
        def run() -> object:
            kept, fused.CPU_PIECE_BYTES = fused.CPU_PIECE_BYTES, size
            try:
                return work()
            finally:
                fused.CPU_PIECE_BYTES = kept

        return run

    default = fused.CPU_PIECE_BYTES
    sizes = [s for s in (1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 26) if s != default]
    return {f"pieces of {s >> 10} KiB": sized(s) for s in (default, *sizes)}


def layer_groups(tokens: int, dim: int) -> dict[str, Forms]:
    x, y = (torch.randn(1, tokens, dim).to(BF16) for _ in range(2))
    shift, scale = (torch.randn(1, 1, dim) for _ in range(2))
    weight, rotation = torch.ones(dim, dtype=BF16), torch.randn(tokens, 1, 64, 2)
    spans = fused.spans_of(None, tokens)
    gain, bias = (1 + scale).flatten(), shift.flatten()
    small = gain.to(BF16), bias.to(BF16)
    norm = {
        "modulated_layer_norm": lambda: fused.modulated_layer_norm(x, shift, scale, spans, 1e-6),
        "F.layer_norm whole, float32 gain": lambda: F.layer_norm(x, (dim,), gain, bias, 1e-6),
        "F.layer_norm whole, bf16 gain (inexact)": lambda: F.layer_norm(x, (dim,), *small, 1e-6),
        "F.layer_norm of float32": lambda: F.layer_norm(x.float(), (dim,), gain, bias, 1e-6).to(BF16),
    }
    add = {
        "gated_add": lambda: fused.gated_add(x, y, scale, spans),
        "addcmul whole, float32": lambda: x.copy_(torch.addcmul(x.float(), y.float(), scale)),
    }
    heads = dim // 128
    return {
        "layer norm": norm,
        "gated add": add,
        "layer norm, pieces": piece_forms(norm["modulated_layer_norm"]),
        "gated add, pieces": piece_forms(add["gated_add"]),
        "norm of q and RoPE, pieces": piece_forms(
            lambda: fused.rms_norm_heads(x, weight, 1e-6, heads, rotation)
        ),
    }


def attention_forms(tokens: int, heads: int) -> Forms:
    """Queries against the text: 64 keys with a bias (ours), 512 keys (padding computed), 64 without bias."""
    q = torch.randn(1, heads, tokens, 128).to(BF16)
    long, short = (torch.randn(1, n, heads, 128).to(BF16).transpose(1, 2) for n in (512, 64))
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    bias = torch.zeros(1, 1, 1, 64, dtype=BF16)
    whole = bias.expand(1, heads, tokens, 64)
    return {
        "64 keys with bias": lambda: F.scaled_dot_product_attention(strided, short, short, attn_mask=bias),
        "64 keys with bias written out": lambda: F.scaled_dot_product_attention(
            strided, short, short, attn_mask=whole.contiguous()
        ),
        "64 keys without bias": lambda: F.scaled_dot_product_attention(strided, short, short),
        "512 keys without bias": lambda: F.scaled_dot_product_attention(strided, long, long),
    }


def self_attention_forms(tokens: int, heads: int) -> Forms:
    q = torch.randn(1, tokens, heads, 128).to(BF16).transpose(1, 2)
    plain, wide = q.contiguous(), q.float()
    return {
        "heads behind tokens": lambda: F.scaled_dot_product_attention(q, q, q),
        "heads in front": lambda: F.scaled_dot_product_attention(plain, plain, plain),
        "float32": lambda: F.scaled_dot_product_attention(wide, wide, wide),
    }


def at_offset(weight: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` bytes behind a multiple of 64, as a mapped weight does."""
    room = torch.empty(weight.numel() * 2 + 256, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset
    return room[start : start + weight.numel() * 2].view(BF16).view(weight.shape).copy_(weight)


def linear_groups(tokens: int, dim: int, ffn_dim: int) -> dict[str, Forms]:
    x = torch.randn(1, tokens, dim).to(BF16)
    weight = (torch.randn(dim, dim) / dim).to(BF16)
    rise, fall = (torch.randn(ffn_dim, dim) / dim).to(BF16), (torch.randn(dim, ffn_dim) / dim).to(BF16)
    joined = torch.cat([weight] * 3)
    offsets: Forms = {
        f"weight {offset} bytes past a multiple of 64": partial(F.linear, x, at_offset(weight, offset))
        for offset in (0, 8, 2)
    }
    packed: Forms = {
        "q, k, v apart": lambda: [F.linear(x, weight) for _ in range(3)],
        "q, k, v as one": lambda: F.linear(x, joined),
    }

    def feed(chunk: int) -> Callable[[], object]:
        def run() -> None:
            for part in x.split(chunk, dim=1):
                F.linear(torch.ops.aten.gelu_(F.linear(part, rise), approximate="tanh"), fall)

        return run

    sizes = (768, 256, 384, 512, 1024, tokens)
    return {
        "alignment": offsets,
        "q k v": packed,
        "feed-forward": {f"{n} tokens at a time": feed(n) for n in sizes},
    }


def groups(names: list[str], scale: float) -> dict[str, Forms]:
    """All experiments by title; ``scale`` shrinks pictures and sequences."""
    tokens, dim = max(64, int(2000 * scale)), 1536 if scale > 0.1 else 256
    found: dict[str, Forms] = {}
    if "conv" in names:
        for full, height, width, frames in PICTURES:
            channels = full if scale > 0.1 else full // 12
            h, w = max(4, int(height * scale)), max(4, int(width * scale))
            found[f"conv3d {channels} channels, {frames} x {h} x {w}"] = conv_forms(channels, h, w, frames)
        for channels, height, width in ((384, 120, 208), (192, 240, 416)):
            h, w = max(4, int(height * scale)), max(4, int(width * scale))
            found[f"upsampling {channels} channels, 4 x {h} x {w}"] = upsample_forms(channels, h, w)
        found["conv2d 192 to 96 channels"] = conv2d_forms(
            192, max(4, int(480 * scale)), max(4, int(832 * scale))
        )
    if "norm" in names:
        for channels, height, width, _ in PICTURES[1:]:
            h, w = max(4, int(height * scale)), max(4, int(width * scale))
            found[f"norm {channels} channels, 4 x {h} x {w}"] = norm_forms(channels, h, w, 4)
    if "layer" in names:
        found |= {f"{title}, {tokens} x {dim}": forms for title, forms in layer_groups(tokens, dim).items()}
    if "attention" in names:
        found[f"cross-attention, {tokens} queries"] = attention_forms(tokens, dim // 128)
        found[f"self-attention, {tokens} tokens"] = self_attention_forms(tokens, dim // 128)
    if "linear" in names:
        found |= {
            f"{title}, {tokens} x {dim}": forms
            for title, forms in linear_groups(tokens, dim, dim * 35 // 6).items()
        }
    return found


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    known = ["conv", "norm", "layer", "attention", "linear"]
    arguments.add_argument("names", nargs="*", help=f"of {', '.join(known)}; default: all")
    arguments.add_argument(
        "--scale", type=float, default=0.5, help="1: a picture of 480 x 832, 2000 tokens; 0.25 takes seconds"
    )
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.no_grad():
        for title, forms in groups(given.names or known, given.scale).items():
            rows += compared(title, forms, given.repeats)
    report("micro", rows, given.out, threads)


if __name__ == "__main__":
    main()

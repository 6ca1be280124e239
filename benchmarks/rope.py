"""Rotary positions alone: our form against the official complex128 one, diffusers' one, and other forms.

    python benchmarks/rope.py            # (1, 2000, 12, 128), bf16 and fp32
    python benchmarks/rope.py --compile  # also torch.compile (needs a C++ compiler, a minute)

The official form builds its table per call and sample; here it is given the finished table, as all others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, interleaved, milliseconds, parser, report, set_threads
from diffsynth.ops.fused import rms_norm_heads
from diffsynth.ops.rope import grid_rotation, rotate

Form = Callable[[Tensor], Tensor]
PEERS = ("official, complex128", "diffusers")


def official(x: Tensor, turns: Tensor) -> Tensor:
    """Wan2.1 ``wan/modules/model.py`` rope_apply, one sample: complex128."""
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).float().type_as(x)


def diffusers_form(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """diffusers' WanAttnProcessor: strided pairs, tables of float32 with each number twice."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosine[..., 0::2], sine[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


def strided_form(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2).to(x.dtype)


def swapped_form(x: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """x cos + swap(x) (-sin, sin): two full-width passes."""
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cosine, swapped, signed_sine).to(x.dtype)


def in_place_form(x: Tensor, turns: Tensor, tokens: int) -> Tensor:
    """Complex64 piece by piece over its own input, as rms_norm_heads walks."""
    for start in range(0, x.shape[1], tokens):
        part = x[:, start : start + tokens]
        pairs = torch.view_as_complex(part.float().unflatten(-1, (-1, 2)))
        part.copy_(torch.view_as_real(pairs * turns[start : start + tokens]).flatten(-2))
    return x


def forms(rotation: Tensor, compiled: bool) -> dict[str, Form]:
    """Every form with its table."""
    wide = torch.view_as_complex(rotation.double())
    narrow = torch.view_as_complex(rotation)
    cosine, sine = rotation.unbind(-1)
    twice = {"cos": cosine.repeat_interleave(2, -1), "sin": sine.repeat_interleave(2, -1)}
    signed = torch.stack([-sine, sine], dim=-1).flatten(-2)
    known: dict[str, Form] = {
        "official, complex128": lambda x: official(x, wide),
        "diffusers": lambda x: diffusers_form(x, twice["cos"], twice["sin"]),
        "ours: rotate, complex64": lambda x: rotate(x, rotation),
        "ours: rms_norm_heads without norm, in place": lambda x: rms_norm_heads(
            x.flatten(2), None, 1e-6, x.shape[2], rotation
        ),
        "cos and sin, strided, stacked": lambda x: strided_form(x, cosine, sine),
        "cos and sin, swapped": lambda x: swapped_form(x, twice["cos"], signed),
        "complex64 in place, 64 tokens": lambda x: in_place_form(x, narrow, 64),
        "complex64 in place, 256 tokens": lambda x: in_place_form(x, narrow, 256),
    }
    if compiled:
        for name, one in (("strided", strided_form), ("swapped", swapped_form)):
            tables = (cosine, sine) if name == "strided" else (twice["cos"], signed)
            fast = torch.compile(one, dynamic=False)
            known[f"compiled: cos and sin, {name}"] = lambda x, f=fast, t=tables: f(x, *t)
    return known


def norm_forms(rotation: Tensor, weight: Tensor, heads: int) -> dict[str, Form]:
    """Norm of q or k and rotation together, as a block needs them: x (B, L, D)."""
    cosine, sine = (part.repeat_interleave(2, -1) for part in rotation.unbind(-1))
    wide = torch.view_as_complex(rotation.double())

    def official_both(x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return official((y.type_as(x) * weight).unflatten(2, (heads, -1)), wide)

    return {
        "official": official_both,
        "diffusers": lambda x: diffusers_form(
            F.rms_norm(x, x.shape[-1:], weight, 1e-6).unflatten(2, (heads, -1)), cosine, sine
        ),
        "ours": lambda x: rms_norm_heads(x, weight, 1e-6, heads, rotation),
    }


def rope_rows(
    dtype: torch.dtype, grid: tuple[int, int, int], heads: int, *, repeats: int, compiled: bool
) -> list[Row]:
    rotation = grid_rotation(*(range(n) for n in grid), head_dim=128)
    x = torch.randn(1, rotation.shape[0], heads, 128).to(dtype)
    exact = official(x.double(), torch.view_as_complex(exact_table(grid)))
    known = forms(rotation, compiled)
    errors = {name: float((form(x.clone()).double() - exact).abs().max()) for name, form in known.items()}
    # Each form its own input: those in place turn theirs again and again, which keeps its size.
    inputs = {name: x.clone() for name in known}
    spent = interleaved({n: (lambda n=n: known[n](inputs[n])) for n in known}, repeats=repeats, warmup=2)
    label = f"RoPE {tuple(x.shape)} {str(dtype).removeprefix('torch.')}"
    fastest = min(spent, key=lambda n: sorted(spent[n])[len(spent[n]) // 2])
    goal = ">= 2.5, error <= 1e-6" if dtype == torch.float32 else ">= 2.5"
    peers = {name: PEERS if name.startswith("ours") else PEERS[:1] for name in known}
    return [
        Row(
            figure=f"{label}: {name}",
            unit="ms",
            ours=milliseconds(spent[name]),
            peer_name=peer,
            peer=milliseconds(spent[peer]),
            goal=goal if name.startswith("ours") and peer == PEERS[0] else "",
            notes=f"largest error {errors[name]:.1e}, {peer} {errors[peer]:.1e}; the fastest is {fastest!r}",
        )
        for name in known
        for peer in peers[name]
        if name != peer
    ]


def exact_table(grid: tuple[int, int, int]) -> Tensor:
    """The table in float64, written once more from the paper: 22, 21 and 21 pairs for 128."""
    parts = []
    for axis, size in enumerate((44, 42, 42)):
        angles = torch.arange(grid[axis], dtype=torch.float64)[:, None] / 10000.0 ** (
            torch.arange(0, size, 2).double() / size
        )
        view = [1, 1, 1]
        view[axis] = grid[axis]
        parts.append(torch.stack([angles.cos(), angles.sin()], -1).view(*view, -1, 2).expand(*grid, -1, 2))
    return torch.cat(parts, dim=3).reshape(-1, 1, 64, 2)


def norm_rows(dtype: torch.dtype, grid: tuple[int, int, int], heads: int, repeats: int) -> list[Row]:
    rotation = grid_rotation(*(range(n) for n in grid), head_dim=128)
    weight = torch.rand(heads * 128).to(dtype) + 0.5
    known = norm_forms(rotation, weight, heads)
    inputs = {name: torch.randn(1, rotation.shape[0], heads * 128).to(dtype) for name in known}
    spent = interleaved({n: (lambda n=n: known[n](inputs[n])) for n in known}, repeats=repeats, warmup=2)
    label = f"norm of q and RoPE {tuple(inputs['ours'].shape)} {str(dtype).removeprefix('torch.')}"
    ours = milliseconds(spent["ours"])
    return [
        Row(figure=label, unit="ms", ours=ours, peer_name=peer, peer=milliseconds(spent[peer]))
        for peer in ("official", "diffusers")
    ]


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--grid", default="5,20,20", help="frames, rows, columns in patches")
    arguments.add_argument("--heads", type=int, default=12)
    arguments.add_argument("--compile", action="store_true")
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    grid = tuple(int(n) for n in given.grid.split(","))
    rows: list[Row] = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            rows += rope_rows(dtype, grid, given.heads, repeats=given.repeats, compiled=given.compile)
            rows += norm_rows(dtype, grid, given.heads, given.repeats)
    report("rope", rows, given.out, threads)


if __name__ == "__main__":
    main()

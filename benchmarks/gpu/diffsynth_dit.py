"""A DiT that runs as DiffSynth's first version did: the baseline to beat, on the same weights.

Each Linear whose weight rests in host memory takes a temporary copy of it at every call: a blocking copy from
pageable memory, through which fp8 weights are widened on the CPU. Norms are deep-copied and moved at every
call. RoPE is computed in complex128, norms and modulations are separate passes over the whole stream,
attention is torch's default, text is embedded and projected to keys at every call, and the two sides of the
guidance are two calls. Weights in fp8 are plain casts of everything, without scales.

Letters: B batch, L tokens, D width, N heads, d = D / N. Written from a description of its behaviour; see
"VRAM management" in DiffSynth-Studio 1.1.7 (``diffsynth/vram_management/layers.py``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig
from diffsynth.ops.rope import THETA, axis_sizes

NUM_POSITIONS = 1024  # of the rotation tables


class PlainRMSNorm(nn.Module):
    """In float32, back to the stream's dtype, times the gain: four passes."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class PlainAttention(nn.Module):
    """q, k, v, o and the norms of q and k."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = PlainRMSNorm(config.dim, config.eps)
        self.norm_k = PlainRMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, context: Tensor, turns: Tensor | None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        if turns is not None:
            q, k = turned(q, turns, self.num_heads), turned(k, turns, self.num_heads)
        heads = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads)
        return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def turned(x: Tensor, turns: Tensor, num_heads: int) -> Tensor:
    """Rotate pairs in complex128: x (B, L, D), turns (L, 1, d / 2) -> (B, L, D)."""
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(2, (num_heads, -1, 2)))
    return torch.view_as_real(pairs * turns).flatten(2).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class PlainBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on the whole stream."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = PlainAttention(config), PlainAttention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, x: Tensor, context: Tensor, t_mod: Tensor, turns: Tensor) -> Tensor:
        rows = (self.modulation.to(t_mod) + t_mod).chunk(6, dim=1)
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = rows
        y = modulated(self.norm1(x), shift_sa, scale_sa)
        x = x + gate_sa * self.self_attn(y, y, turns)
        x = x + self.cross_attn(self.norm3(x), context, None)
        y = modulated(self.norm2(x), shift_ffn, scale_ffn)
        return x + gate_ffn * self.ffn(y)  # type: ignore[no-any-return]


class PlainHead(nn.Module):
    def __init__(self, dim: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: Tensor, embedded_time: Tensor) -> Tensor:
        shift, scale = (self.modulation.to(embedded_time) + embedded_time[:, None]).chunk(2, dim=1)
        return self.head(modulated(self.norm(x), shift, scale))  # type: ignore[no-any-return]


class PlainDiT(nn.Module):
    """The transformer of a text-to-video model; layers stand in the order in which v1 met them."""

    tables: list[Tensor]  # set by `sharing`: made after meta

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = PlainHead(dim, patch * config.out_dim, config.eps)

    @classmethod
    def sharing(cls, ours: WanDiT) -> PlainDiT:
        """The baseline on the very weights of ours: nothing is copied."""
        with torch.device("meta"):
            made = cls(ours.config)
        made.load_state_dict(ours.state_dict(), strict=True, assign=True)
        made.tables = rotation_tables(ours.config.dim // ours.config.num_heads)
        return made.eval().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Latents (1, C, F, H, W) and text (1, 512, text_dim), both in the compute dtype -> velocity."""
        half = self.config.freq_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=latents.device) / half)
        angles = timestep.to(latents.device, torch.float64)[:, None] * frequencies
        embedded = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(latents.dtype))
        t_mod = self.time_projection(embedded).unflatten(1, (6, -1))
        context = self.text_embedding(text)
        patches = self.patch_embedding(latents)
        f, h, w = patches.shape[2:]
        x = patches.flatten(2).transpose(1, 2).contiguous()
        turns = self._turns(f, h, w).to(x.device)
        for block in self.blocks:
            x = block(x, context, t_mod, turns)
        y = self.head(x, embedded)
        pf, ph, pw = self.config.patch_size
        y = y.view(1, f, h, w, pf, ph, pw, self.config.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return y.reshape(1, self.config.out_dim, f * pf, h * ph, w * pw)  # type: ignore[no-any-return]

    def _turns(self, f: int, h: int, w: int) -> Tensor:
        """Rotations of every token, built anew at each call: (L, 1, d / 2) complex128."""
        frames, rows, columns = self.tables
        parts = [
            frames[:f].view(f, 1, 1, -1).expand(f, h, w, -1),
            rows[:h].view(1, h, 1, -1).expand(f, h, w, -1),
            columns[:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ]
        return torch.cat(parts, dim=-1).reshape(f * h * w, 1, -1)


def rotation_tables(head_dim: int) -> list[Tensor]:
    """One table an axis, (positions, size / 2) complex128 on the CPU."""
    tables = []
    for size in axis_sizes(head_dim):
        frequencies = THETA ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(torch.arange(NUM_POSITIONS, dtype=torch.float64), frequencies)
        tables.append(torch.polar(torch.ones_like(angles), angles))
    return tables


class PerCall(nn.Module):
    """A layer whose weights rest where they are; a call on another device or dtype makes copies."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            bias = None if self.layer.bias is None else temporary(self.layer.bias, x)
            return F.linear(x, temporary(self.layer.weight, x), bias)
        if all(t.device == x.device and t.dtype == x.dtype for t in self.layer.parameters()):
            return self.layer(x)  # type: ignore[no-any-return]
        return copy.deepcopy(self.layer).to(device=x.device, dtype=x.dtype)(x)  # type: ignore[no-any-return]


def temporary(resting: Tensor, x: Tensor) -> Tensor:
    """A weight in the device and dtype of x: itself, or a blocking copy."""
    if resting.device == x.device and resting.dtype == x.dtype:
        return resting.data
    return torch.empty_like(resting, device=x.device, dtype=x.dtype).copy_(resting)


MANAGED = (nn.Linear, nn.Conv3d, nn.LayerNorm, PlainRMSNorm)


@dataclass
class _Budget:
    limit: int | None
    used: int = 0


def manage(network: nn.Module, device: torch.device, num_persistent: int | None) -> None:
    """Keep the first ``num_persistent`` parameters on the device (None: all), send the rest to host memory.

    May be called again with another number.
    """
    _manage(network, device, _Budget(num_persistent))
    managed = {id(t) for m in network.modules() if isinstance(m, PerCall) for t in m.parameters()}
    for tensor in network.parameters():
        if id(tensor) not in managed:  # modulation tables: in host memory they are moved at every call
            tensor.data = tensor.data.to(device if num_persistent is None else "cpu")


def _manage(module: nn.Module, device: torch.device, budget: _Budget) -> None:
    for name, child in module.named_children():
        layer = child.layer if isinstance(child, PerCall) else child
        if not isinstance(layer, MANAGED):
            _manage(child, device, budget)
            continue
        budget.used += sum(p.numel() for p in layer.parameters())
        stays = budget.limit is None or budget.used <= budget.limit
        layer.to(device if stays else "cpu")
        if layer is child:
            setattr(module, name, PerCall(layer))

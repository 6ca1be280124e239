"""The umT5 encoder that Wan reads text with.

Letters: B batch, L tokens, D width, N heads, d size of a head.
Every layer has its own table of relative positions; scores are not scaled; layers have no biases; the
feed-forward is gated by a tanh-GELU. Source: Wan2.1 ``wan/modules/t5.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from diffsynth.ops.attention import attend
from diffsynth.ops.fp8_policy import Fp8Policy
from diffsynth.ops.fused import rms_norm
from diffsynth.vram_management.visit import BlockNetwork

MAX_DISTANCE = 128  # tokens farther apart than this share the last bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """Sizes of a umT5 encoder, all told by the file's shapes."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    eps: float = 1e-6


def relative_buckets(num_tokens: int, num_buckets: int, max_distance: int = MAX_DISTANCE) -> Tensor:
    """Bucket of every (query, key) pair, (L, L) int64: half for keys behind, half for keys ahead.

    Near distances have a bucket each; from num_buckets / 4 on buckets widen logarithmically.
    """
    positions = torch.arange(num_tokens)
    offset = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    near = half // 2
    distance = offset.abs()
    # In float32, as the models were trained: a boundary distance may fall one bucket short of exact
    # arithmetic.
    ratio = torch.log(distance.clamp(min=1).float() / near) / math.log(max_distance / near)
    far = (near + (ratio * (half - near)).long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


class LayerNorm(nn.Module):
    """T5's norm: a root mean square without mean, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps).to(x.dtype)


class RelativePositions(nn.Module):
    """A layer's table: one score per bucket and head."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """(L, L) -> (1, N, L, L)."""
        scores: Tensor = self.embedding(buckets).permute(2, 0, 1).unsqueeze(0)
        # Fused kernels of a GPU take a bias whose last axis is dense; a CPU's sum in another order on it.
        return scores.contiguous() if scores.device.type == "cuda" else scores


class SelfAttention(nn.Module):
    """Attention of a layer; scores are not divided by the root of the head size."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.dim, config.dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.num_heads, -1) for layer in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, bias=bias, scale=1.0).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """fc2(fc1(x) gelu(gate(x)))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(config.dim, config.dim_ffn, bias=False), nn.GELU(approximate="tanh")
        )
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))  # type: ignore[no-any-return]


class TextEncoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps)
        self.attn = SelfAttention(config)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativePositions(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """X (B, L, D); ``mask`` (B, 1, 1, L) holds 0 or the lowest number, or is None."""
        bias = self.pos_embedding(buckets)
        x = x + self.attn(self.norm1(x), bias if mask is None else bias + mask)
        return x + self.ffn(self.norm2(x))  # type: ignore[no-any-return]


class WanTextEncoder(BlockNetwork):
    """Token ids -> features.

    The table of words may rest on another device than the layers: some rows of it are looked up there.
    """

    blocks: nn.ModuleList

    host_tables = ("token_embedding.weight",)
    fp8_policy = Fp8Policy()

    def __init__(self, config: TextEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TextEncoderConfig()
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(TextEncoderLayer(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.dim, config.eps)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> WanTextEncoder:
        """Build from plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
        names = {f.name for f in fields(TextEncoderConfig)}
        return cls(TextEncoderConfig(**{k: v for k, v in config.items() if k in names}))  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return self.norm.weight.device

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return features of every position.

        Args:
            ids: (B, L) int64.
            mask: (B, L), 0 where a position is padding: it is not attended to. None: no padding.

        Returns:
            (B, L, D); rows of padding are computed and mean nothing.
        """
        x = self.token_embedding(ids.to(self.token_embedding.weight.device)).to(self.device)
        buckets = relative_buckets(ids.shape[1], self.config.num_buckets).to(self.device)
        hidden = None
        if mask is not None and not bool(mask.all()):
            mask = mask.to(self.device)
            lowest = torch.finfo(x.dtype).min
            hidden = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask == 0, lowest)[:, None, None, :]
        for block in self.visit(self.blocks):
            x = block(x, buckets, hidden)
        return self.norm(x)  # type: ignore[no-any-return]

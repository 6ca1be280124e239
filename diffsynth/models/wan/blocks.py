"""One block of the DiT: self-attention, cross-attention, feed-forward.

Letters: B batch, L tokens, S keys, D width, N heads, d = D / N, K distinct times of a call.
Names of layers are those of the official checkpoints. Source: Wan2.1 ``wan/modules/model.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.models.wan.stream import Call, KeySlot
from diffsynth.models.wan.text_tokens import TextTokens
from diffsynth.ops.attention import AttentionKernel
from diffsynth.ops.fused import Span, add, gated_add, modulated_layer_norm, rms_norm_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSizes:
    """What the layers of a block need to know of their network."""

    dim: int
    ffn_dim: int
    num_heads: int
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    has_image: bool = False  # keys and values of image tokens beside those of the text


class RMSNorm(nn.Module):
    """The gain of q and k, over the full width; applied by `rms_norm_heads`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """What self- and cross-attention share: q, k, v, o and the norms of q and k."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.head_dim = sizes.dim // sizes.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(sizes.dim, sizes.dim) for _ in range(4))
        self.norm_q = RMSNorm(sizes.dim) if sizes.qk_norm else None
        self.norm_k = RMSNorm(sizes.dim) if sizes.qk_norm else None

    def heads(self, x: Tensor, norm: RMSNorm | None, rotation: Tensor | None = None) -> Tensor:
        """(B, L, N d) -> normalised, turned, (B, L, N, d); N are the heads that the layers here hold."""
        weight = None if norm is None else norm.weight
        return rms_norm_heads(x, weight, self.sizes.eps, x.shape[-1] // self.head_dim, rotation)


class SelfAttention(Attention):
    """All tokens to all tokens, with rotary positions."""

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, Tensor],
        spans: tuple[Span, ...],
        rotation: Tensor,
        attention: AttentionKernel,
    ) -> Tensor:
        """X (B, L, D) before its norm; ``modulation``: shift and scale, (B, K, D) each."""
        # Normalised here and not by the caller: a module's arguments live until it returns, and this one
        # would be a sixth stream beside x, q, k, v and what attention gives.
        q, k, v = self.project(modulated_layer_norm(x, *modulation, spans, self.sizes.eps), rotation)
        out = attention(q, k, v)
        del q, k, v
        return self.o(out.flatten(2))  # type: ignore[no-any-return]

    def project(self, y: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised tokens (B, L, D) -> q, k and v, (B, L, N, d)."""
        q = self.heads(self.q(y), self.norm_q, rotation)
        k = self.heads(self.k(y), self.norm_k, rotation)
        return q, k, self.heads(self.v(y), None)


@dataclass(frozen=True, kw_only=True)
class CrossKeys:
    """Keys and values of one block's cross-attention: they do not change during a generation."""

    k: Tensor  # (B, S, N, d)
    v: Tensor
    bias: Tensor | None  # (1, 1, 1, S), see `TextTokens`
    k_img: Tensor | None = None  # (B, 257 or 514, N, d)
    v_img: Tensor | None = None


class CrossAttention(Attention):
    """Tokens to text, and with ``has_image`` also to image tokens, each with keys of its own."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__(sizes)
        if sizes.has_image:
            self.k_img, self.v_img = nn.Linear(sizes.dim, sizes.dim), nn.Linear(sizes.dim, sizes.dim)
            self.norm_k_img = RMSNorm(sizes.dim) if sizes.qk_norm else None

    def keys(self, text: TextTokens, image: Tensor | None) -> CrossKeys:
        """Project embedded text (B, S, D) and image tokens (B, S', D)."""
        k = self.heads(self.k(text.x), self.norm_k)
        v = self.heads(self.v(text.x), None)
        bias = None if text.bias is None else text.bias.to(k.dtype)
        if image is None or not self.sizes.has_image:
            return CrossKeys(k=k, v=v, bias=bias)
        k_img = self.heads(self.k_img(image), self.norm_k_img)
        return CrossKeys(k=k, v=v, bias=bias, k_img=k_img, v_img=self.heads(self.v_img(image), None))

    def forward(self, x: Tensor, keys: CrossKeys, attention: AttentionKernel) -> Tensor:
        q = self.heads(self.q(x), self.norm_q)
        del x
        out = attention(q, keys.k, keys.v, bias=keys.bias)
        if keys.k_img is not None and keys.v_img is not None:
            out = add(out, attention(q, keys.k_img, keys.v_img))
        del q
        return self.o(out.flatten(2))  # type: ignore[no-any-return]


class DiTBlock(nn.Module):
    """A block as every Wan network has it. Outside of training it changes its input in place."""

    # What `CrossAttention.keys` reads and nothing else does: not needed once the keys are kept.
    key_layers = tuple(f"cross_attn.{name}." for name in ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img"))

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.self_attn = SelfAttention(sizes)
        self.cross_attn = CrossAttention(sizes)
        self.norm3 = nn.LayerNorm(sizes.dim, eps=sizes.eps) if sizes.cross_attn_norm else nn.Identity()
        self.ffn = nn.Sequential(
            nn.Linear(sizes.dim, sizes.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(sizes.ffn_dim, sizes.dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, sizes.dim))
        nn.init.normal_(self.modulation, std=sizes.dim**-0.5)

    def forward(self, x: Tensor, rotation: Tensor, slot: KeySlot, call: Call) -> Tensor:
        """X (B, L, D) -> (B, L, D)."""
        rows = self.modulation.float() + call.t_mod  # (B, K, 6, D)
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = rows.unbind(2)
        eps, spans = self.sizes.eps, call.spans
        y = self.self_attn(x, (shift_sa, scale_sa), spans, rotation, call.self_attention)
        x = gated_add(x, y, gate_sa, spans)
        del y
        # Made in here, where the block's weights are: in training, sharded or streamed.
        keys = self.cross_attn.keys(call.text, call.image) if slot.keys is None else slot.keys
        if slot.keeps:
            slot.keys = keys
        x = add(x, self.cross_attn(self.norm3(x), keys, call.cross_attention))
        y = self._feed_forward(
            modulated_layer_norm(x, shift_ffn, scale_ffn, spans, eps), call.ffn_chunk_tokens
        )
        return gated_add(x, y, gate_ffn, spans)

    def _feed_forward(self, x: Tensor, chunk_tokens: int) -> Tensor:
        rise, _, fall = self.ffn
        if torch.is_grad_enabled():
            return fall(F.gelu(rise(x), approximate="tanh"))  # type: ignore[no-any-return]
        # The hidden layer is 2.7 to 5.8 times as wide as the stream: some tokens at a time, and over its own
        # input.
        for part in torch.chunk(x, -(-x.shape[1] // chunk_tokens), dim=1):
            part.copy_(fall(torch.ops.aten.gelu_(rise(part), approximate="tanh")))
        return x

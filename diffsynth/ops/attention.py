"""Scaled dot-product attention behind one call shape.

Letters: B batch, L queries, S keys, N heads, d size of a head.
Every kernel takes q (B, L, N, d), k and v (B, S, N, d), an optional additive ``bias`` that broadcasts to
(B, N, L, S), and gives (B, L, N, d). `attend` picks: PyTorch's own kernels, which choose flash or
memory-efficient attention by device, dtype and bias.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class AttentionKernel(Protocol):
    """One way to compute attention; may be wrapped, for instance to exchange heads between devices."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor: ...


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale + bias) v; ``scale`` defaults to 1 / sqrt(d)."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2)

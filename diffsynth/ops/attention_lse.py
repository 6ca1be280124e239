"""Attention that also tells the log-sum-exp of its scores: results over several sets of keys can be joined.

Letters: B batch, L queries, S keys, N heads, d size of a head. Exact kernels of torch alone, without a bias.
softmax over keys A and B together is the mean of the softmax over A and that over B, weighed by exp(lse):
what kept keys, rolling caches and rings of devices need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffsynth.ops.attention_kernels import EFFICIENT, FLASH

SCORES_BYTES = 256 << 20  # of one piece, where no kernel of torch takes the call


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v, and the log-sum-exp of the scores.

    Args:
        q: (B, L, N, d).
        k: (B, S, N, d).
        v: (B, S, N, d).
        scale: None is 1 / sqrt(d).

    Returns:
        (B, L, N, d), and (B, N, L) float32 (float64 where q is).
    """
    turned = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*turned, scale=scale)
    elif q.device.type == "cuda" and q.shape[-1] % 8 == 0 and FLASH.refuses(q, k, v, None) is None:
        out, lse = aten._scaled_dot_product_flash_attention(*turned, scale=scale)[:2]
    elif q.device.type == "cuda" and EFFICIENT.refuses(q, k, v, None) is None:
        # this kernel pads the number of queries
        out, lse = aten._scaled_dot_product_efficient_attention(*turned, None, True, scale=scale)[:2]
        lse = lse[..., : q.shape[1]]
    else:
        out, lse = _plain(*turned, q.shape[-1] ** -0.5 if scale is None else scale)
    return out.transpose(1, 2), lse


def join_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What attention over all keys gives, from results over parts of them; (B, L, N, d) in their dtype."""
    outs, sums = [out for out, _ in parts], torch.stack([lse for _, lse in parts])
    weights = torch.softmax(sums, dim=0).transpose(2, 3)[..., None]  # (parts, B, L, N, 1)
    joined = sum(out.to(weights.dtype) * weight for out, weight in zip(outs, weights, strict=True))
    assert isinstance(joined, Tensor)
    return joined.to(outs[0].dtype)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Some queries at a time; heads stand before the tokens."""
    batch, heads, _, _ = q.shape
    rows = max(1, SCORES_BYTES // (4 * batch * heads * k.shape[2]))
    outs, sums = [], []
    for part in torch.split(q, rows, dim=2):
        scores = (part.float() @ k.float().transpose(2, 3)) * scale
        lse = torch.logsumexp(scores, dim=-1)
        outs.append((torch.exp(scores - lse[..., None]).to(v.dtype)) @ v)
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)

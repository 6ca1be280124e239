"""Attention in plain torch whose memory does not grow with the length of a video.

Letters: B batch, L queries, S keys, N heads, d size of a head.
Where no fused kernel runs (bfloat16 on a GPU older than Ampere, float64, odd heads) torch would build all
B x N x L x S scores at once: 14B at 480P has 43e9 of them. Here a few heads, or some queries of one head, are
worked on at a time. A group of queries stays large, so that the products are still those of large matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 << 20  # scores, their softmax and their bias that exist at a time
_MATRICES = 3  # those three


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """softmax(q k^T scale + bias) v, with scores in float32 (float64 for float64).

    Args:
        q: (B, L, N, d).
        k: (B, S, N, d).
        v: (B, S, N, d).
        bias: broadcasts to (B, N, L, S).
        scale: of the scores; None is 1 / sqrt(d).

    Returns:
        (B, L, N, d) in q's dtype. Training recomputes each group's scores instead of keeping them.
    """
    batch, length, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    is_training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    out = None if is_training else q.new_empty(batch, length, num_heads, v.shape[-1]).transpose(1, 2)
    done: list[Tensor] = []
    for item in range(batch):
        for heads, queries in _groups(num_heads, length, _query_bytes(k)):
            place = (item, heads, queries)
            given = (q[place], k[item, heads], v[item, heads], _part(bias, place), scale)
            if out is None:
                done.append(checkpoint(_attend, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                out[place] = _attend(*given)
    if out is None:
        out = _assembled(done, num_heads, length)
    return out.transpose(1, 2)


def _query_bytes(k: Tensor) -> int:
    """Bytes that one query of one head asks for; k (B, N, S, d)."""
    wide = torch.promote_types(k.dtype, torch.float32)
    return _MATRICES * k.shape[2] * wide.itemsize


def _groups(num_heads: int, length: int, query_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Cut heads and queries: whole heads while one fits, else the queries of one head at a time."""
    num_queries = max(1, min(length, CHUNK_BYTES // query_bytes))
    heads_at_once = max(1, CHUNK_BYTES // (query_bytes * length)) if num_queries == length else 1
    for head in range(0, num_heads, heads_at_once):
        for query in range(0, length, num_queries):
            yield (
                slice(head, min(head + heads_at_once, num_heads)),
                slice(query, min(query + num_queries, length)),
            )


def _part(bias: Tensor | None, place: tuple[int, slice, slice]) -> Tensor | None:
    """The bias of a group, unexpanded: (N or 1, L or 1, S or 1)."""
    if bias is None:
        return None
    whole = slice(None)
    item, heads, queries = place
    return bias[
        item if bias.shape[0] > 1 else 0,
        heads if bias.shape[1] > 1 else whole,
        queries if bias.shape[2] > 1 else whole,
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """One group: q (n, l, d), k and v (n, S, d), bias broadcasts to (n, l, S)."""
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q, k, v))
    # baddbmm adds the bias while it multiplies: no matrix of its own for the sum.
    start = q.new_zeros(1, 1, 1) if bias is None else bias.to(wide)
    scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=0 if bias is None else 1, alpha=scale)
    return torch.bmm(scores.softmax(-1), v).to(dtype)


def _assembled(done: list[Tensor], num_heads: int, length: int) -> Tensor:
    """Groups (n, l, d) in order of item, head, query -> (B, N, L, d)."""
    heads: list[Tensor] = []
    row: list[Tensor] = []
    for part in done:
        row.append(part)
        if sum(p.shape[1] for p in row) == length:
            heads.append(torch.cat(row, dim=1))
            row = []
    whole = torch.cat(heads)
    return whole.view(-1, num_heads, *whole.shape[1:])

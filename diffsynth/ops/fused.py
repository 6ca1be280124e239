"""The elementwise work of a DiT block, in few passes and little memory.

Letters: B batch, L tokens, D width, K distinct times of a call, N heads, d = D / N.
Arithmetic is float32 whatever the dtype of the stream; one rounding at the end. On a CPU the stream is walked
in pieces that stay in its cache; on a GPU in long pieces. Outside of training the stream is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_PIECE_BYTES = 1 << 20  # float32 bytes of one piece: about half of a core's second-level cache
GPU_PIECE_BYTES = 256 << 20
MAX_RUNS = 64  # more runs of equal clocks than this are gathered token by token


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that one modulation row serves: ``row`` of K, or one row per token when ``row`` is a tensor."""

    tokens: slice
    row: int | Tensor

    def of(self, table: Tensor) -> Tensor:
        """The rows of a table (B, K, D) for these tokens: (B, 1, D) or (B, n, D)."""
        return table[:, self.row : self.row + 1] if isinstance(self.row, int) else table[:, self.row]


def spans_of(clock: Tensor | None, num_tokens: int) -> tuple[Span, ...]:
    """Cut a sequence where its clock changes. ``clock`` is (L,) on the CPU, or None for one time."""
    if clock is None:
        return (Span(slice(0, num_tokens), 0),)
    turns = (clock.diff() != 0).nonzero().flatten() + 1
    bounds = [0, *turns.tolist(), num_tokens]
    if len(bounds) - 1 > MAX_RUNS:
        return (Span(slice(0, num_tokens), clock),)
    return tuple(Span(slice(a, b), int(clock[a])) for a, b in pairwise(bounds))


def pieces(span: Span, row_bytes: int, device: torch.device) -> list[Span]:
    """Cut a span into pieces that are worked on at a time."""
    budget = CPU_PIECE_BYTES if device.type == "cpu" else GPU_PIECE_BYTES
    step = max(16, budget // max(row_bytes, 1))
    start, stop = span.tokens.start, span.tokens.stop
    cuts = [slice(a, min(a + step, stop)) for a in range(start, stop, step)]
    if isinstance(span.row, int):
        return [Span(cut, span.row) for cut in cuts]
    return [Span(cut, span.row[cut.start - start : cut.stop - start]) for cut in cuts]


def _walk(
    x: Tensor, spans: tuple[Span, ...], work: Callable[[Tensor, Span], Tensor], out: Tensor | None
) -> Tensor:
    """Apply ``work`` piece by piece along dim 1 and write to ``out``, or collect the results for autograd."""
    if out is None:
        done = [work(x[:, span.tokens], span).to(x.dtype) for span in spans]
        return torch.cat(done, dim=1) if len(done) > 1 else done[0]
    row_bytes = 4 * x.shape[0] * x[0, 0].numel()
    for p in (piece for span in spans for piece in pieces(span, row_bytes, x.device)):
        out[:, p.tokens] = work(x[:, p.tokens], p)
    return out


def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, spans: tuple[Span, ...], eps: float
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift; x (B, L, D), shift and scale (B, K, D) float32; returns x's dtype."""
    width = x.shape[-1:]
    is_fused = x.shape[0] == 1 and (x.dtype == torch.float32 or x.device.type == "cpu")
    if is_fused and len(spans) == 1 and isinstance(spans[0].row, int):
        # One row of modulation serves all: it is the norm's own gain and bias, one fused kernel.
        gain, bias = 1 + spans[0].of(scale), spans[0].of(shift)
        return F.layer_norm(x, width, gain.flatten(), bias.flatten(), eps)

    def work(part: Tensor, span: Span) -> Tensor:
        return torch.addcmul(span.of(shift), F.layer_norm(part.float(), width, eps=eps), 1 + span.of(scale))

    return _walk(x, spans, work, None if torch.is_grad_enabled() else torch.empty_like(x))


def gated_add(x: Tensor, y: Tensor, gate: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """X + y gate, gate (B, K, D) float32. Changes x outside of training."""

    def work(part: Tensor, span: Span) -> Tensor:
        return torch.addcmul(part.float(), y[:, span.tokens].float(), span.of(gate))

    return _walk(x, spans, work, None if torch.is_grad_enabled() else x)


def add(x: Tensor, y: Tensor) -> Tensor:
    """X + y. Changes x outside of training."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """X / sqrt(mean of squares + eps) x weight over the last dim, in float32; float32 result."""
    x = x.float()
    scaled = x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
    return scaled if weight is None else scaled * weight.float()


def rms_norm_heads(
    x: Tensor, weight: Tensor | None, eps: float, num_heads: int, rotation: Tensor | None = None
) -> Tensor:
    """Normalise q or k over the full width, turn its pairs, split the heads.

    Args:
        x: (B, L, D); changed outside of training.
        weight: (D,), or None for no norm.
        eps: added to the mean square.
        num_heads: N.
        rotation: (L, 1, d / 2, 2) float32, or None for no rotary embedding.

    Returns:
        (B, L, N, d) in x's dtype.
    """

    def work(part: Tensor, span: Span) -> Tensor:
        part = part.float() if weight is None else rms_norm(part, weight, eps)
        if rotation is None:
            return part
        pairs = torch.view_as_complex(part.view(*part.shape[:2], num_heads, -1, 2))
        turned = pairs * torch.view_as_complex(rotation[span.tokens])
        return torch.view_as_real(turned).flatten(2)

    if weight is not None or rotation is not None:
        x = _walk(x, spans_of(None, x.shape[1]), work, None if torch.is_grad_enabled() else x)
    return x.view(*x.shape[:2], num_heads, -1)


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear layer in float32 whatever the weight's dtype, for the few places that want it."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

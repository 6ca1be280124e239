"""The elementwise work of a DiT block, in few passes and little memory.

Letters: B batch, L tokens, D width, K distinct times of a call, N heads, d = D / N.
Arithmetic is float32 whatever the dtype of the stream; one rounding at the end. On a CPU the stream is walked
in pieces that stay in its cache; on a GPU it is worked on whole by generated kernels (`compiled`), or in long
pieces where nothing is compiled. Outside of training the stream is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsynth.ops.compiled import add_gated, compiler, write_modulated_norm, write_rms_norm, write_rotated

CPU_PIECE_BYTES = 1 << 20  # float32 bytes of one piece: about half of a core's second-level cache
GPU_PIECE_BYTES = 64 << 20
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


def _not_compiled(
    x: Tensor, spans: tuple[Span, ...], generated: Callable[[slice, Span, Tensor | None], bool]
) -> tuple[Span, ...]:
    """Run a generated kernel on each span; return the spans that none has worked on, in most cases () or all.

    ``generated`` is given tokens, their span, and the row of each token where a span has several.
    """
    if not compiler.serves(x):
        return spans
    rows = (None if isinstance(span.row, int) else span.row.to(x.device) for span in spans)
    return tuple(span for span, row in zip(spans, rows, strict=True) if not generated(span.tokens, span, row))


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

    if torch.is_grad_enabled():
        return _walk(x, spans, work if x.dtype == torch.float32 else _computed_again(work), None)
    out = torch.empty_like(x)

    def generated(tokens: slice, span: Span, rows: Tensor | None) -> bool:
        tables = (shift, scale) if rows is not None else (span.of(shift), span.of(scale))
        return write_modulated_norm(out[:, tokens], x[:, tokens], *tables, rows, eps)

    return _walk(x, _not_compiled(x, spans, generated), work, out)


def _computed_again(work: Callable[[Tensor, Span], Tensor]) -> Callable[[Tensor, Span], Tensor]:
    """The same work; its backward pass makes the float32 copy of its input again instead of keeping it."""
    if torch.compiler.is_compiling():
        return work  # the compiler sees to it

    def again(part: Tensor, span: Span) -> Tensor:
        out: Tensor = checkpoint(work, part, span, use_reentrant=False, preserve_rng_state=False)
        return out

    return again


def gated_add(x: Tensor, y: Tensor, gate: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """X + y gate, gate (B, K, D) float32. Changes x outside of training."""

    def work(part: Tensor, span: Span) -> Tensor:
        return torch.addcmul(part.float(), y[:, span.tokens].float(), span.of(gate))

    def generated(tokens: slice, span: Span, rows: Tensor | None) -> bool:
        table = gate if rows is not None else span.of(gate)
        return add_gated(x[:, tokens], y[:, tokens], table, rows)

    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return _walk(x, spans, work, None)  # the compiler sees to it
    if torch.is_grad_enabled():
        made: Tensor = _GatedSum.apply(x, y, gate, spans)  # type: ignore[no-untyped-call]
        return made
    return _walk(x, _not_compiled(x, spans, generated), work, x)


class _GatedSum(torch.autograd.Function):
    """`gated_add` in training: in pieces, where autograd would make float32 copies of whole streams."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, spans: tuple[Span, ...]) -> Tensor:
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[2] else None)
        ctx.spans = spans

        def work(part: Tensor, span: Span) -> Tensor:
            return torch.addcmul(part.float(), y[:, span.tokens].float(), span.of(gate))

        return _walk(x, spans, work, torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, y = ctx.saved_tensors
        of_y = None
        if ctx.needs_input_grad[1]:
            of_y = _walk(
                grads[0],
                ctx.spans,
                lambda part, span: part.float() * span.of(gate),
                torch.empty_like(grads[0]),
            )
        of_gate = None if y is None else _gradient_of_gate(gate, y, grads[0], ctx.spans)
        return grads[0], of_y, of_gate, None


def _gradient_of_gate(gate: Tensor, y: Tensor, grad: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Of each row, the sum over its tokens; a whole span at a time, for a sum in pieces rounds otherwise."""
    total: Tensor | None = None
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        rows = [span.of(leaf) for span in spans]
    for span, row in zip(reversed(spans), reversed(rows), strict=True):
        product = grad[:, span.tokens].float() * y[:, span.tokens].float()
        (part,) = torch.autograd.grad(row, leaf, product.sum_to_size(row.shape))
        total = part if total is None else total + part
    assert total is not None
    return total


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
        x: (B, L, D); may be changed outside of training.
        weight: (D,), or None for no norm.
        eps: added to the mean square.
        num_heads: N.
        rotation: (L, 1, d / 2, 2) float32, or None for no rotary embedding.

    Returns:
        (B, L, N, d) in x's dtype.
    """
    if torch.is_grad_enabled() and weight is not None:
        made_again: Tensor = _NormalisedHeads.apply(  # type: ignore[no-untyped-call]
            x, weight, rotation, eps, num_heads
        )
        x = made_again
    elif weight is not None or rotation is not None:
        made = _rms_norm_generated(x, weight, eps, num_heads, rotation)

        def work(part: Tensor, span: Span) -> Tensor:
            part = part.float() if weight is None else rms_norm(part, weight, eps)
            return part if rotation is None else _turned(part, rotation[span.tokens], num_heads)

        whole = spans_of(None, x.shape[1])
        x = _walk(x, whole, work, None if torch.is_grad_enabled() else x) if made is None else made
    return x.view(*x.shape[:2], num_heads, -1)


def _turned(x: Tensor, rotation: Tensor, num_heads: int) -> Tensor:
    """Turn the pairs of float32 x (B, n, D) by ``rotation`` (n, 1, d / 2, 2)."""
    pairs = torch.view_as_complex(x.view(*x.shape[:2], num_heads, -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(rotation)).flatten(2)


class _NormalisedHeads(torch.autograd.Function):
    """`rms_norm_heads` in training: keeps x alone, where autograd would keep three float32 copies of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rotation: Tensor | None, eps: float, num_heads: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rotation, ctx.eps, ctx.num_heads = rotation, eps, num_heads

        def work(part: Tensor, span: Span) -> Tensor:
            part = rms_norm(part, weight, eps)
            return part if rotation is None else _turned(part, rotation[span.tokens], num_heads)

        return _walk(x, spans_of(None, x.shape[1]), work, torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x r, r = 1 / sqrt(mean x^2 + eps): dx = r (g - n mean(g n)) for g = grad weight."""
        x: Tensor
        weight: Tensor
        x, weight = ctx.saved_tensors
        rotation: Tensor | None = ctx.rotation
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if rotation is not None:
            turns_back = torch.conj_physical(torch.view_as_complex(rotation))
            rotation = torch.view_as_real(turns_back)

        def work(part: Tensor, span: Span) -> Tensor:
            grad, wide = grads[0][:, span.tokens].float(), part.float()
            if rotation is not None:
                grad = _turned(grad.contiguous(), rotation[span.tokens], ctx.num_heads)
            rate = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
            normed = wide * rate
            if of_weight is not None:
                of_weight.add_((grad * normed).sum((0, 1)))
            grad = grad * weight.float()
            return rate * (grad - normed * (grad * normed).mean(-1, keepdim=True))

        whole = spans_of(None, x.shape[1])
        of_x = _walk(x, whole, work, torch.empty_like(x)) if any(ctx.needs_input_grad[:2]) else None
        return of_x, None if of_weight is None else of_weight.to(weight.dtype), None, None, None


def _rms_norm_generated(
    x: Tensor, weight: Tensor | None, eps: float, num_heads: int, rotation: Tensor | None
) -> Tensor | None:
    """`rms_norm_heads` by a generated kernel into a new tensor, (B, L, D); None when none runs.

    One tensor more than in place, while it is made; a block's peak comes later, in attention, which holds q,
    k, v and the result.
    """
    if not compiler.serves(x):
        return None
    out = torch.empty_like(x)
    if rotation is None:
        assert weight is not None, "nothing to do"
        return out if write_rms_norm(out, x, weight, eps) else None
    shape = (*x.shape[:2], num_heads, -1, 2)
    gain = None if weight is None else weight.view(shape[2:])
    return out if write_rotated(out.view(shape), x.view(shape), gain, rotation, eps) else None


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear layer in float32 whatever the weight's dtype, for the few places that want it."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

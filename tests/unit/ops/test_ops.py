"""Kernels give what their formula says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffsynth.errors import ArgumentError
from diffsynth.ops import fused
from diffsynth.ops.attention import attend
from diffsynth.ops.fused import gated_add, modulated_layer_norm, rms_norm_heads, spans_of
from diffsynth.ops.rope import axis_sizes, rotate, video_rotation
from diffsynth.ops.tiling import Tile, blend_mask, tile_starts

CPU = torch.device("cpu")


def _complex128(x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """The official form: a table of unit complex numbers in double precision."""
    head_dim = x.shape[-1]
    parts = []
    index = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    for axis, size in enumerate(axis_sizes(head_dim)):
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        parts.append(torch.polar(torch.ones((), dtype=torch.float64), index[:, axis, None] * frequencies))
    table = torch.cat(parts, dim=1)[:, None]
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2)


def test_rotation_equals_the_complex128_form() -> None:
    grid = (5, 20, 20)
    x = torch.randn(1, 2000, 2, 128)
    ours = rotate(x, video_rotation(grid, 128, CPU))
    assert (ours - _complex128(x, grid)).abs().max() < 1e-6
    assert ours.dtype == torch.float32


def test_norm_and_rotation_in_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight = (2, 4, 6), 1 + 0.1 * torch.randn(64)
    x, rotation = torch.randn(2, 48, 64), video_rotation((2, 4, 6), 32, CPU)
    whole = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    expected = _complex128(whole.view(2, 48, 2, 32), grid).float()
    monkeypatch.setattr(fused, "CPU_PIECE_BYTES", 16 * 64 * 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            made = rms_norm_heads(x.clone(), weight, 1e-6, 2, rotation)
        torch.testing.assert_close(made, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clock", ["one", "two-runs", "every-token"])
@pytest.mark.parametrize("batch", [1, 2])
def test_modulated_norm_and_gate_follow_each_tokens_clock(dtype: torch.dtype, clock: str, batch: int) -> None:
    tokens, width = 200, 32
    clocks = {
        "one": None,
        "two-runs": (torch.arange(tokens) >= 70).long(),
        "every-token": torch.arange(tokens),
    }[clock]
    times = 1 if clocks is None else int(clocks.max()) + 1
    shift, scale, gate = (torch.randn(batch, times, width) for _ in range(3))
    rows = torch.zeros(tokens, dtype=torch.long) if clocks is None else clocks
    x, y = (torch.randn(batch, tokens, width).to(dtype) for _ in range(2))
    spans = spans_of(clocks, tokens)
    assert len(spans) == {"one": 1, "two-runs": 2, "every-token": 1}[clock]
    # One rounding to the stream's dtype at the end.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    normed = F.layer_norm(x.float(), (width,), eps=1e-6) * (1 + scale[:, rows]) + shift[:, rows]
    with torch.no_grad():
        made = modulated_layer_norm(x, shift, scale, spans, 1e-6)
        torch.testing.assert_close(made.float(), normed, atol=tolerance, rtol=1e-2 if tolerance > 1e-3 else 0)
        added = gated_add(x.clone(), y, gate, spans)
    expected = x.float() + y.float() * gate[:, rows]
    torch.testing.assert_close(added.float(), expected, atol=tolerance, rtol=1e-2 if tolerance > 1e-3 else 0)
    assert made.dtype == added.dtype == dtype


def test_inference_changes_the_stream_in_place_and_training_does_not() -> None:
    x, y, gate = torch.zeros(1, 4, 8), torch.ones(1, 4, 8), torch.ones(1, 1, 8)
    assert gated_add(x, y, gate, spans_of(None, 4)) is not x and not x.any()
    with torch.no_grad():
        assert gated_add(x, y, gate, spans_of(None, 4)) is x and x.all()


@pytest.mark.parametrize(
    "clock", [None, [0] * 9 + [1] * 5 + [0] * 6], ids=["one-time", "a-time-that-returns"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_sum_has_the_gradients_of_its_formula_bit_by_bit(
    dtype: torch.dtype, clock: list[int] | None
) -> None:
    spans = spans_of(None if clock is None else torch.tensor(clock), 20)
    x, y, upward = (torch.randn(2, 20, 24).to(dtype) for _ in range(3))
    gate = torch.randn(2, 2, 24)
    found = []
    for is_plain in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, y, gate)]
        if is_plain:
            parts = [
                torch.addcmul(leaves[0][:, s.tokens].float(), leaves[1][:, s.tokens].float(), s.of(leaves[2]))
                for s in spans
            ]
            made = torch.cat(parts, dim=1).to(dtype)
        else:
            made = gated_add(*leaves, spans)
        made.backward(upward)
        found.append([made.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_equals_the_formula() -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    bias = torch.randn(1, 1, 1, 7)
    scores = torch.einsum("blnd,bsnd->bnls", q, k) / 8**0.5 + bias
    expected = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v, bias=bias), expected, atol=1e-6, rtol=1e-5)


def test_tiles_cover_the_picture_and_blend_to_one() -> None:
    starts = tile_starts(11, 5, 3)
    assert starts == [0, 3, 6] and starts[-1] + 5 >= 11
    total = torch.zeros(11 * 8)
    for start in starts:
        tile = Tile(top=0, left=start, height=4, width=min(5, 11 - start), border=(0, 2), picture=(4, 11))
        mask = blend_mask(tile, scale=8, device="cpu")
        assert mask.min() > 0 and mask.max() == 1
        total[start * 8 : (start + tile.width) * 8] += mask[0]
    assert (total >= 1).all()  # no pixel is left thin: the sum of masks divides it to one


def test_a_stride_larger_than_the_tile_is_refused() -> None:
    with pytest.raises(ArgumentError, match="tile_stride is 6"):
        tile_starts(10, 5, 6)

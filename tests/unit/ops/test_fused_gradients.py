"""What is computed again in the backward pass has the gradients of the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffsynth.ops.fused import modulated_layer_norm, rms_norm, rms_norm_heads, spans_of
from diffsynth.ops.rope import rotate, video_rotation

TURNS = video_rotation((2, 3, 4), 24, torch.device("cpu"))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("rotation", [None, TURNS], ids=["plain", "turned"])
def test_normalised_heads(rotation: Tensor | None) -> None:
    x, weight, grad = drawn(2, 24, 48), drawn(48), torch.randn(2, 24, 2, 24)
    plain = rms_norm(x, weight, 1e-6).view(2, 24, 2, 24)
    plain = plain if rotation is None else rotate(plain, rotation)
    expected = torch.autograd.grad(plain, (x, weight), grad)
    out = rms_norm_heads(x, weight, 1e-6, 2, rotation)
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(out, (x, weight), grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # fp32, sums in another order


def test_normalised_heads_keep_their_input_alone() -> None:
    x, weight = drawn(1, 24, 48, dtype=torch.bfloat16), drawn(48)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm_heads(x, weight, 1e-6, 2, TURNS)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulated_norm_of_two_clocks(dtype: torch.dtype) -> None:
    x, shift, scale = drawn(2, 24, 48, dtype=dtype), drawn(2, 2, 48), drawn(2, 2, 48)
    clock, grad = torch.tensor([0] * 6 + [1] * 18), torch.randn(2, 24, 48).to(dtype)
    out = modulated_layer_norm(x, shift, scale, spans_of(clock, 24), 1e-6)
    plain = F.layer_norm(x.float(), (48,), eps=1e-6) * (1 + scale[:, clock]) + shift[:, clock]
    expected = torch.autograd.grad(plain, (x, shift, scale), grad.float())
    found = torch.autograd.grad(out, (x, shift, scale), grad)
    # bf16: one rounding of the gradient of x
    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-2)

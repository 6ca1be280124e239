"""What has to be told where kernels compute no numbers: shapes that cuDNN's plans would need, and answers.

Registered as torch's own kernels are, below dispatch and autograd; nothing of the project is changed. A
number that the host asks the device for is answered by rule, since no kernel has written it: a truth is True,
a real number 0.5. Whole numbers are read from memory as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")
_launched = ctypes.CDLL(None).fake_cuda_count_launch  # one kernel, of a library that is not asked


def _answer(name: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def register(function: Callable[..., object]) -> Callable[..., object]:
        _library.impl(name, function, "CUDA")
        return function

    return register


convolutions: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = []  # input, weight, whether channels last


@_answer("cudnn_convolution")
def convolution(
    x: Tensor, weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int,
    *settings: bool,
) -> Tensor:  # fmt: skip
    if x.device != weight.device or x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(f"a convolution of {x.dtype} {x.shape} by {weight.dtype} {weight.shape}")
    kernel = weight.shape[2:]
    sizes = [
        (length + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for length, pad, gap, taps, step in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    is_last = looks_channels_last(x) or looks_channels_last(weight)
    layout = form if is_last else torch.contiguous_format
    convolutions.append((tuple(x.shape), tuple(weight.shape), is_last))
    shape = (x.shape[0], weight.shape[0], *sizes)
    # What is laid out otherwise is copied, and the copy is there beside the result.
    held = [t.contiguous(memory_format=layout) for t in (x, weight)]
    _launched()
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    del held
    return out


def looks_channels_last(x: Tensor) -> bool:
    """Whether torch takes strides for channels last (c10 ``is_channels_last_strides_2d`` and ``_3d``).

    Strides must not fall from the channels outward, over axes of length 1 too.
    """
    least = 0
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if x.shape[dim] == 0 or x.stride(dim) < least or x.stride(1) == 0:
            return False
        if dim == 0 and least == x.stride(1):
            return False
        least = x.stride(dim) * x.shape[dim]
    return True


@_answer("_scaled_dot_product_cudnn_attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, compute_log_sumexp: bool, dropout: float = 0.0,
    is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[object, ...]:  # fmt: skip
    batch, heads, length, _ = q.shape
    _launched()
    out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    sums = q.new_empty(batch, heads, length, 1, dtype=torch.float32) if compute_log_sumexp else q.new_empty(0)
    seed, nothing = q.new_empty((), dtype=torch.int64), q.new_empty(0)
    return out, sums, nothing.long(), nothing.long(), length, k.shape[2], seed, seed, nothing


@_answer("_scaled_dot_product_cudnn_attention_backward")
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object, **more: object
) -> tuple[Tensor, ...]:
    _launched()
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


asked: list[torch.dtype] = []  # of numbers that the host has asked for


@_answer("_local_scalar_dense")
def number(x: Tensor) -> object:
    asked.append(x.dtype)
    read = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)  # as torch
    torch.cuda.current_stream(x.device).synchronize()
    if x.dtype == torch.bool:
        return True
    if x.dtype.is_floating_point:
        return 0.5
    return read.item()


@_answer("nonzero")
def places(x: Tensor) -> Tensor:
    """All of them."""
    grid = torch.ones(x.shape, dtype=torch.bool).nonzero()
    return grid.to(x.device)

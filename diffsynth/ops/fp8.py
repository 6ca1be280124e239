"""Linear layers whose weights are kept in fp8: half the bytes of bfloat16, at rest and on their way.

An e4m3 number has three bits of mantissa and reaches from 2^-9 to 448. Each row of a weight (one output
channel) is divided by its largest magnitude / 448 before it is rounded, so that no row lies at the lower end
of the format: the error is 2.7 % (root mean square) whatever the weights' size, where a plain cast of weights
of standard deviation 0.01 errs by 5.7 % and turns one in thirteen to zero. weight = stored.float() * scale.

There are two ways to multiply. Widened: the weight takes the dtype of x where it is needed, and the product
is that of a plain layer. In fp8: tokens are rounded to e4m3 too, and the card multiplies fp8 with fp8.

Letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.errors import CorruptCheckpointError
from diffsynth.ops.fused import CPU_PIECE_BYTES, GPU_PIECE_BYTES

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_NAME = "fp8 (e4m3, per row)"
FP8_MULTIPLE = 16  # of K and N, for the fp8 product
ROOM_ALIGNMENT = 128  # elements; matrices that begin at 256 bytes multiply fastest

Compute = Literal["widened", "fp8"]


def quantise(weight: Tensor, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """Round a weight to e4m3, each row in its own scale, on the device where it lies.

    Args:
        weight: (N, K), any floating dtype.
        name: of the tensor, for the error.

    Returns:
        The elements (N, K) float8_e4m3fn, and the scale (N, 1) float32: a row's largest magnitude / 448, or
        the smallest normal number for a row of zeros.

    Raises:
        CorruptCheckpointError: when the weight holds NaN or infinity; names it.
    """
    if weight.dtype == torch.float64:
        weight = weight.float()
    largest = torch.linalg.vector_norm(weight, ord=float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    if not bool(torch.isfinite(largest).all()):
        count = int((~torch.isfinite(largest)).sum())
        raise CorruptCheckpointError(
            f"{name} holds NaN or infinity in {count} of {len(largest)} rows and cannot be kept in fp8. The "
            "file is damaged, or was exported with a dtype too narrow for it; download it again, or use the "
            "bf16 file."
        )
    scale = (largest / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    stored = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    for rows in _row_pieces(weight):
        stored[rows] = weight[rows].float() / scale[rows]
    return stored, scale


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to e4m3, each token in its own scale.

    The scales are powers of two: dividing by them is exact in x's own dtype, so that nothing is widened to
    float32 on the way, and costs no precision in a format that floats.

    Args:
        x: (M, K), bfloat16, float16 or float32.

    Returns:
        The elements (M, K) float8_e4m3fn and the scale (M, 1) float32. A token with NaN or infinity becomes
        NaN.
    """
    if x.dtype == torch.float16:
        x = x.float()  # its exponents do not reach the inverse of a small scale
    tiny = torch.finfo(x.dtype).tiny
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=1, keepdim=True).float()
    ratio = (largest / FP8_MAX).clamp_(min=tiny)
    scale = ratio / torch.frexp(ratio).mantissa  # mantissas are 0.5 to 1: the power of two above the ratio
    inverse = scale.reciprocal().to(x.dtype)
    elements = torch.empty(x.shape, dtype=FP8, device=x.device)
    for rows in _row_pieces(x):
        elements[rows] = x[rows] * inverse[rows]
    return elements, scale


def widen(stored: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return stored * scale, (N, K) in ``dtype``: multiplied in float32, rounded once."""
    out = torch.empty(stored.shape, dtype=dtype, device=stored.device) if out is None else out
    for rows in _row_pieces(stored):
        out[rows].copy_(stored[rows]).mul_(scale[rows])  # e4m3 fits into every wider dtype without rounding
    return out


def _row_pieces(matrix: Tensor) -> Iterator[slice]:
    """Rows that are worked on at a time, so that what is float32 on the way stays small."""
    budget = CPU_PIECE_BYTES if matrix.device.type == "cpu" else GPU_PIECE_BYTES
    step = max(1, budget // (4 * max(1, matrix.shape[1])))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


class Fp8Linear(nn.Module):
    """A Linear layer for inference whose weight is e4m3 elements and a scale per row.

    Args:
        linear: the layer whose place it takes; its sizes, device and bias are kept, its weight is not read.
        may_multiply: whether the fp8 product is good enough here; told by the network's policy.

    Set from outside: ``compute``, by `set_fp8_compute`; ``room``, where the widened weight is shared by all
    who use the layer while its block is visited.
    """

    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, *, may_multiply: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device = linear.weight.device
        elements = torch.empty(self.out_features, self.in_features, dtype=FP8, device=device)
        self.weight = nn.Parameter(elements, requires_grad=False)
        self.register_buffer(
            "weight_scale", torch.empty(self.out_features, 1, dtype=torch.float32, device=device)
        )
        self.bias = linear.bias
        fits = self.in_features % FP8_MULTIPLE == self.out_features % FP8_MULTIPLE == 0
        self.may_multiply = may_multiply and fits
        self.compute: Compute = "widened"
        self.room: WideningRoom | None = None

    def forward(self, x: Tensor) -> Tensor:
        """X (..., K) -> (..., N) in x's dtype."""
        # Neither the fp8 product nor a weight that is soon written over can be differentiated.
        if x.requires_grad:
            return F.linear(x, self.widened(x.dtype), self._bias(x.dtype))
        if self.compute == "fp8":
            return self._multiply(x)
        weight = self.widened(x.dtype) if self.room is None else self.room.weight_of(self, x.dtype)
        return F.linear(x, weight, self._bias(x.dtype))

    def widened(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight, (N, K) in ``dtype``."""
        return widen(self.weight, self.weight_scale, dtype, out)

    def extra_repr(self) -> str:
        """Sizes and arithmetic, as PyTorch shows a module."""
        return f"in_features={self.in_features}, out_features={self.out_features}, compute={self.compute!r}"

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        elements, scale = quantise_tokens(x.reshape(-1, self.in_features))
        out = torch._scaled_mm(
            elements, self.weight.t(), scale_a=scale, scale_b=self.weight_scale.t(),
            bias=self._bias(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def] # as torch declares it
        # A cast of the network leaves the pair as it is stored: wider elements would be no more precise, and
        # scales of 1e-4 lose their precision in float16. Moves to a device go through.
        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            is_stored = tensor.dtype == FP8 or tensor is self.weight_scale
            return tensor.to(out.device) if is_stored and out.dtype != tensor.dtype else out

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


class WideningRoom:
    """Memory for the widened weights of one block at a time, taken once and used by every block in turn."""

    def __init__(self) -> None:
        self._capacity = 0  # elements
        self._memory: Tensor | None = None
        self._used = 0
        self._held: dict[Fp8Linear, Tensor] = {}

    def open(self, layers: Sequence[Fp8Linear]) -> None:
        """Let these layers share their widened weights here until `close`."""
        need = sum(_aligned(layer.weight.numel()) for layer in layers if layer.compute == "widened")
        if need > self._capacity:
            self._capacity, self._memory = need, None
        for layer in layers:
            layer.room = self

    def close(self, layers: Sequence[Fp8Linear]) -> None:
        """Forget the weights; the memory stays for the next block."""
        for layer in layers:
            if layer.room is self:
                layer.room = None
        self._held.clear()
        self._used = 0

    def weight_of(self, layer: Fp8Linear, dtype: torch.dtype) -> Tensor:
        """The widened weight of an open layer; widened now if nobody has asked for it yet."""
        held = self._held.get(layer)
        if held is not None and held.dtype == dtype:
            return held
        if self._memory is None:
            self._memory = torch.empty(self._capacity, dtype=dtype, device=layer.weight.device)
        count = layer.weight.numel()
        piece = self._memory[self._used : self._used + count]
        if piece.numel() < count or piece.dtype != dtype or piece.device != layer.weight.device:
            return layer.widened(dtype)
        self._used += _aligned(count)
        self._held[layer] = layer.widened(dtype, out=piece.view(layer.weight.shape))
        return self._held[layer]


def _aligned(count: int) -> int:
    return -(-count // ROOM_ALIGNMENT) * ROOM_ALIGNMENT


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype for people: "bfloat16", "fp8 (e4m3, per row)"."""
    return FP8_NAME if dtype == FP8 else str(dtype).removeprefix("torch.")


def fp8_layers(network: nn.Module) -> list[Fp8Linear]:
    """Every `Fp8Linear` of a network."""
    return [layer for layer in network.modules() if isinstance(layer, Fp8Linear)]

"""The elementwise work of a DiT block as kernels that torch.compile generates: each reads its input once.

Letters: B batch, L tokens, D width, K distinct times of a call, N heads, d = D / N.
Arithmetic is float32 and rounds once, as in `fused`, which calls these on a GPU with Triton, outside of
training. Elementwise work is memory traffic, and eager kernels make several passes for each of these.
Sequences are worked on whole; only their length is left open, so that one kernel serves every video.

Results are written into tensors that exist: no copy of the stream is made beside them. What a kernel reads at
another place than it writes (the other half of a rotated pair) goes to a tensor of its own.

DIFFSYNTH_COMPILE=0 switches this off. A compiler that has failed once is left alone for the rest of the
process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Generic, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsynth.errors import ArgumentError
from diffsynth.ops.out_of_memory import is_out_of_memory

VARIABLE = "DIFFSYNTH_COMPILE"
_OLDEST_FOR_TRITON = (7, 0)  # compute capability; AMD's chips, which it counts otherwise, are above it

logger = logging.getLogger("diffsynth")
P = ParamSpec("P")


class Compiler:
    """Whether this process still compiles."""

    def __init__(self) -> None:
        self.has_failed = False

    def serves(self, x: Tensor) -> bool:
        """Whether work on ``x`` runs in generated kernels.

        Raises:
            ArgumentError: when DIFFSYNTH_COMPILE is neither 0 nor 1.
        """
        if x.device.type != "cuda" or torch.is_grad_enabled() or self.has_failed:
            return False
        if torch.compiler.is_compiling():  # a compiled block generates kernels of its own
            return False
        return is_switched_on() and _has_triton(x.device)

    def give_up(self, name: str, error: Exception) -> None:
        """Compile nothing more."""
        if not self.has_failed:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            logger.warning(
                "torch.compile failed on %s (%s): elementwise work runs uncompiled, slower, with the same "
                "results. %s=0 leaves the compiler out from the start.",
                name,
                reason,
                VARIABLE,
            )
        self.has_failed = True


compiler = Compiler()


@lru_cache(maxsize=1)
def is_switched_on() -> bool:
    """What DIFFSYNTH_COMPILE says, read once."""
    value = os.environ.get(VARIABLE, "1").strip()
    if value not in {"", "0", "1"}:
        raise ArgumentError(
            f"{VARIABLE} is {value!r}; give 0 (never compile) or 1 (compile where it helps, the default)."
        )
    return value != "0"


@lru_cache
def _has_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST_FOR_TRITON


class Generated(Generic[P]):
    """A function that is compiled at its first call, once for each kind of call.

    A kind is what dtypes and sizes say, without the number of tokens. The compiler counts the variants of a
    function, gives up at a limit, and leaves sizes open that have differed once: each kind has a function of
    its own.

    Args:
        function: writes into its first argument.
        token_dims: for each argument, the dim that counts tokens and so differs from call to call, or None.
    """

    def __init__(self, function: Callable[P, None], token_dims: tuple[int | None, ...]) -> None:
        self.function = function
        self._token_dims = token_dims
        self._compiled: dict[tuple[object, ...], Callable[P, None]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Compute, and return True; False when this process does not compile: then nothing was written."""
        if compiler.has_failed:
            return False
        kind = tuple(_kind(arg, dim) for arg, dim in zip(args, self._token_dims, strict=True))
        if kind not in self._compiled:
            # A whole graph or an error: past its limit of variants the compiler would else fall back in
            # silence to this very function run eagerly, with several float32 copies of the stream.
            own = _copy_of(self.function, f"{self.function.__name__}_{len(self._compiled)}")
            self._compiled[kind] = torch.compile(own, fullgraph=True)
        for tensor, dim in zip(args, self._token_dims, strict=True):
            if isinstance(tensor, Tensor) and dim is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        try:
            self._compiled[kind](*args, **kwargs)
        except Exception as error:  # no C compiler, a broken Triton, a chip it does not know, ...
            if is_out_of_memory(error):
                raise  # no fault of the compiler
            compiler.give_up(self.function.__name__, error)
            return False
        return True


def _kind(arg: object, token_dim: int | None) -> object:
    """What tells apart two calls that one kernel does not serve."""
    if not isinstance(arg, Tensor):
        return arg
    shape = arg.shape if token_dim is None else (*arg.shape[:token_dim], *arg.shape[token_dim + 1 :])
    return arg.dtype, shape, arg.device


def _copy_of(function: Callable[P, None], name: str) -> Callable[P, None]:
    """The same function, as another one for the compiler, which knows functions by code and name."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(co_name=name), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _generated(*token_dims: int | None) -> Callable[[Callable[P, None]], Generated[P]]:
    return lambda function: Generated(function, token_dims)


@_generated(1, 1, None, None, 0, None)
def write_modulated_norm(
    out: Tensor, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float
) -> None:
    """Out = LayerNorm(x) (1 + scale) + shift.

    Args:
        out: (B, L, D), another tensor than x.
        x: (B, L, D).
        shift: (B, K, D) float32.
        scale: (B, K, D) float32.
        rows: (L,), the row of shift and scale for each token; None where K is 1.
        eps: added to the variance.
    """
    if rows is not None:
        shift, scale = shift[:, rows], scale[:, rows]
    out.copy_(torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale))


@_generated(1, 1, None, 0)
def add_gated(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> None:
    """X += y gate, in place; x and y (B, L, D), gate (B, K, D) float32, rows as in `write_modulated_norm`."""
    if rows is not None:
        gate = gate[:, rows]
    x.copy_(torch.addcmul(x.float(), y.float(), gate))


@_generated(1, 1, None, None)
def write_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Out = x / sqrt(mean of squares + eps) weight; out and x (B, L, D), weight (D,)."""
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    out.copy_(wide * torch.rsqrt(mean_square + eps) * weight.float())


@_generated(1, 1, None, 0, None)
def write_rotated(out: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor, eps: float) -> None:
    """Out = x normalised as in `write_rms_norm` over all heads, then its pairs turned.

    A function of its own: shapes that differ between two uses of one would be left open in its kernels.

    Args:
        out: (B, L, N, d / 2, 2), another tensor than x.
        x: (B, L, N, d / 2, 2).
        weight: (N, d / 2, 2), or None for no norm.
        rotation: (L, 1, d / 2, 2) float32, cosine and sine.
        eps: added to the mean square.
    """
    wide = x.float()
    if weight is not None:
        mean_square = wide.square().mean(dim=(-3, -2, -1), keepdim=True)
        wide = wide * torch.rsqrt(mean_square + eps) * weight.float()
    # (a + b i)(cos + sin i) in real numbers, each half with its partner: inductor generates no code for
    # complex ones.
    cos, sin = rotation[..., :1], rotation[..., 1:]
    sign = 2 * torch.arange(2, device=x.device) - 1
    out.copy_(wide * cos + wide.flip(-1) * (sin * sign))

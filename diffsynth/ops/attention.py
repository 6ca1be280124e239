"""Scaled dot-product attention behind one call shape, and which kernel computes it.

Letters: B batch, L queries, S keys, N heads, d size of a head.
Every kernel takes q (B, L, N, d), k and v (B, S, N, d), an optional additive ``bias`` that broadcasts to
(B, N, L, S), and gives (B, L, N, d). `attend` picks per call, among exact kernels only:

- with a bias, torch's memory-efficient kernel. Torch itself prefers cuDNN on Hopper and Blackwell, whose
  gradients become NaN there for some lengths and very low scores (pytorch issue 196678);
- on Hopper, without a bias, cuDNN: 1.6 times as fast there as FlashAttention 2 (595 against 370 TFLOP/s at
  16 thousand keys; source: FlashAttention 3's paper). In training from cuDNN 9.15.1 on, else flash: gradients
  of earlier ones are wrong where the length is no multiple of 128 (pytorch issue 169849);
- else torch's own choice, if it has a fused kernel for these tensors;
- else, on a GPU, plain torch in chunks: torch would build the whole matrix of scores.

`attention_kernel` gives one kernel by name; the environment variable DIFFSYNTH_ATTENTION names one for
`attend`. A chosen kernel leaves calls that it cannot take (a bias, another dtype) to the automatic choice,
and says so once.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError
from diffsynth.ops.attention_kernels import (
    CHUNKED,
    CUDNN,
    EFFICIENT,
    FLASH,
    KERNELS,
    SDPA,
    Kernel,
    capability_of,
    torch_takes,
)

VARIABLE = "DIFFSYNTH_ATTENTION"
AUTOMATIC = "auto"
_HOPPER = (9, 0)

logger = logging.getLogger("diffsynth")


class AttentionKernel(Protocol):
    """One way to compute attention; may be wrapped, for instance to exchange heads between devices."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor: ...


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale + bias) v; ``scale`` defaults to 1 / sqrt(d).

    Raises:
        ArgumentError: when DIFFSYNTH_ATTENTION names a kernel that is unknown or not available here.
    """
    chosen = _chosen_by_environment()
    if chosen is not None:
        return chosen(q, k, v, bias=bias, scale=scale)
    return _automatic(q, k, v, bias).compute(q, k, v, bias, scale)


class ChosenKernel:
    """A kernel chosen by name. Calls that it cannot take go to the automatic choice."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._told: set[str] = set()

    @property
    def name(self) -> str:
        """Its name in the table of kernels."""
        return self._kernel.name

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """softmax(q k^T scale + bias) v; ``scale`` defaults to 1 / sqrt(d)."""
        reason = self._kernel.refuses(q, k, v, bias)
        if reason is None:
            return self._kernel.compute(q, k, v, bias, scale)
        other = _automatic(q, k, v, bias)
        if reason not in self._told:
            self._told.add(reason)
            logger.info("Attention kernel %s %s: such calls run on %s.", self.name, reason, other.name)
        return other.compute(q, k, v, bias, scale)

    def __repr__(self) -> str:
        return f"attention_kernel({self.name!r})"


def attention_kernel(name: str, device: torch.device | str | None = None) -> AttentionKernel:
    """Give a kernel by name, to be set as ``dit.attention``.

    Args:
        name: one of the table in `attention_kernels`, or "auto" for `attend`'s own choice.
        device: where it will compute; None is the GPU, where there is one.

    Raises:
        ArgumentError: when there is no such kernel, or not on this device; the message lists all, with the
            reason for each that is not available.
    """
    if name == AUTOMATIC:
        return attend
    return _chosen(name, _device(device), f"attention_kernel({name!r})")


def attention_name(attention: AttentionKernel) -> str:
    """The name of what a network has as its ``attention``; "auto" is the automatic choice.

    Raises:
        ArgumentError: as `attend`.
    """
    chosen = _chosen_by_environment() if attention is attend else attention
    return AUTOMATIC if chosen is None else str(getattr(chosen, "name", repr(chosen)))


def describe_attention(
    device: torch.device | str | None = None, attention: AttentionKernel | None = None
) -> str:
    """Say which kernel computes, and why.

    Args:
        device: where; None is the GPU, where there is one.
        attention: what a network has as its ``attention``; None is `attend`.

    Raises:
        ArgumentError: as `attend`.
    """
    by, chosen = "name", attention
    if attention is None or attention is attend:
        by, chosen = VARIABLE, _chosen_by_environment()
    automatic = _automatic_text(_device(device))
    if chosen is None:
        return automatic
    if not isinstance(chosen, ChosenKernel):
        return repr(chosen)
    return f"{chosen.name}, chosen by {by}; calls that it cannot take run on {automatic}"


def _automatic_text(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{SDPA.name}: {SDPA.title} on {device.type}"
    rest = f"{EFFICIENT.name} with a bias; {CHUNKED.name} where torch has no fused kernel"
    if capability_of(device) == _HOPPER:
        return f"{CUDNN.name}, the fastest exact kernel of torch on Hopper; {rest}"
    return f"{SDPA.name}: {SDPA.title}; {rest}"


def _automatic(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Kernel:
    """The exact kernel for one call."""
    # On the CPU torch's flash kernel takes any dtype and head, and any bias that needs no gradient.
    if q.device.type != "cuda":
        return SDPA
    kernels: tuple[Kernel, ...]
    if bias is not None:
        kernels = (EFFICIENT,)
    elif capability_of(q.device) == _HOPPER:
        kernels = (CUDNN, FLASH)
    else:
        # Named where torch might choose a cuDNN whose gradients are wrong.
        kernels = (FLASH,) if CUDNN.lacks_gradient(q, k, v) else ()
    found = next((kernel for kernel in kernels if kernel.refuses(q, k, v, bias) is None), SDPA)
    return found if found is not SDPA or torch_takes(q, k, v, bias) else CHUNKED


@lru_cache(maxsize=1)
def _chosen_by_environment() -> ChosenKernel | None:
    name = os.environ.get(VARIABLE, "").strip()
    return None if name in {"", AUTOMATIC} else _chosen(name, _device(None), f"{VARIABLE}={name}")


def _chosen(name: str, device: torch.device, asked_by: str) -> ChosenKernel:
    reasons = {kernel.name: kernel.unavailable(device) for kernel in KERNELS}
    if name in reasons and reasons[name] is None:
        return ChosenKernel(next(kernel for kernel in KERNELS if kernel.name == name))
    fault = f"cannot run on {device}: it {_sentence(reasons[name])}" if name in reasons else "is no kernel"
    listed = "\n".join(f"  {known}: {_sentence(reason)}" for known, reason in reasons.items())
    raise ArgumentError(
        f"{asked_by}: {name!r} {fault}. Give {AUTOMATIC!r}, or one that is available:\n{listed}"
    )


def _sentence(reason: str | None) -> str:
    """A reason as it reads behind a kernel's name."""
    if reason is None:
        return "available"
    return reason if reason.startswith("needs") else f"is {reason}"


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)

"""The attention kernels there are, each with where it runs and what it takes.

Letters: B batch, L queries, S keys, N heads, d size of a head.
Libraries are imported when a kernel is asked for, never before. `Kernel.refuses` says beforehand that a
kernel cannot take a call; `attention` then picks another.

Sources of the call shapes: github.com/Dao-AILab/flash-attention (``flash_attn``, ``hopper``,
``flash_attn/cute``), github.com/thu-ml/SageAttention, github.com/facebookresearch/xformers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as cuda_backends
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsynth.ops.attention_chunked import attend_in_chunks

Capability = tuple[int, int]  # NVIDIA's compute capability: (9, 0) is Hopper
CapabilityRange = tuple[Capability, Capability]  # from, to; both included
Compute = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]  # q, k, v, bias, scale

_HALF = (torch.float16, torch.bfloat16)
_FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
_TORCH_TAKES = {
    SDPBackend.FLASH_ATTENTION: cuda_backends.can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: cuda_backends.can_use_efficient_attention,
    SDPBackend.CUDNN_ATTENTION: cuda_backends.can_use_cudnn_attention,
}
_PRIORITY_LOCK = Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One way to compute attention: its name, its needs, its call."""

    name: str  # what `attention_kernel` and DIFFSYNTH_ATTENTION are told
    title: str  # for people
    compute: Compute
    capabilities: tuple[CapabilityRange, ...] = ()  # ranges it runs on; empty: any device
    module: str = ""  # to import; empty: part of torch
    function: str = ""
    install: str = ""  # how to get the module
    dtypes: tuple[torch.dtype, ...] = ()  # empty: any
    head_dims: range | None = None  # sizes of a head it takes; None: any
    backend: SDPBackend | None = None  # of torch's own: torch says what this takes
    takes_bias: bool = False
    is_differentiable: bool = True
    cudnn_for_gradients: int = 0  # oldest version of cuDNN whose gradients are right; 0: it is not cuDNN
    is_exact: bool = True  # False: quantises q and k, so that results differ by more than rounding

    def misfit(self, device: torch.device) -> str | None:
        """Why this hardware cannot run it, or None."""
        if not self.capabilities:
            return None
        capability = capability_of(device)
        if capability and any(lowest <= capability <= highest for lowest, highest in self.capabilities):
            return None
        wanted = ", ".join(_range_text(*ends) for ends in self.capabilities)
        if capability is None:
            return f"needs an NVIDIA GPU of compute capability {wanted}, not {_device_text(device)}"
        return f"needs compute capability {wanted}, this GPU has {_text(capability)}"

    def missing(self) -> str | None:
        """Why its library cannot be used, or None."""
        return _loaded(self.module, self.function)[1] if self.module else None

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on this device, whatever the tensors, or None."""
        return self.misfit(device) or self.missing()

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
        """Why it cannot compute this call, or None; says nothing of sizes that change from call to call."""
        reason = self.unavailable(q.device)
        if reason is not None:
            return reason
        if bias is not None and not self.takes_bias:
            return "takes no bias"
        if not self.is_differentiable and torch.is_grad_enabled() and _wants_grad(q, k, v):
            return "has no gradient"
        if self.lacks_gradient(q, k, v):
            return "needs cuDNN 9.15.1 or newer for right gradients"
        if self.backend is not None and not torch_takes(q, k, v, bias, (self.backend,)):
            return "does not take such tensors, as torch finds"
        return self._refuses_type(q)

    def lacks_gradient(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether gradients are wanted and this version of cuDNN computes them wrongly."""
        if not self.cudnn_for_gradients or not torch.is_grad_enabled() or not _wants_grad(q, k, v):
            return False
        return (torch.backends.cudnn.version() or 0) < self.cudnn_for_gradients  # type: ignore[no-untyped-call]

    def _refuses_type(self, q: Tensor) -> str | None:
        if self.dtypes and q.dtype not in self.dtypes:
            return f"takes {' and '.join(_dtype_text(t) for t in self.dtypes)}, not {_dtype_text(q.dtype)}"
        if self.head_dims is not None and q.shape[-1] not in self.head_dims:
            sizes = self.head_dims
            return f"takes heads of {sizes[0]} to {sizes[-1]} in steps of {sizes.step}, not of {q.shape[-1]}"
        return None


def torch_takes(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backends: tuple[SDPBackend, ...] = _FUSED
) -> bool:
    """Whether one of torch's fused kernels takes this call on a GPU; with none, torch builds the matrix."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    params = cuda_backends.SDPAParams(q, k, v, bias, 0.0, False, False)
    return any(_TORCH_TAKES[backend](params) for backend in backends)


@lru_cache
def capability_of(device: torch.device) -> Capability | None:
    """Compute capability of an NVIDIA GPU; None for anything else (AMD numbers its chips otherwise)."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2)


def _sdpa_by(backend: SDPBackend) -> Compute:
    order = [backend, *(other for other in _FUSED if other != backend), SDPBackend.MATH]

    def compute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
        # The order is a setting of the whole process. All kernels stay allowed, so that another thread's call
        # meets another order at worst; the lock keeps two threads from restoring each other's order.
        with _PRIORITY_LOCK, sdpa_kernel(order, set_priority=True):
            return _sdpa(q, k, v, bias, scale)

    return compute


def _flash(module: str) -> Compute:
    def compute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
        made = _function(module, "flash_attn_func")(q, k, v, softmax_scale=scale)
        # Versions 3 and 4 have given the log-sum-exp beside the result, and later not.
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out

    return compute


def _sage(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    out: Tensor = _function("sageattention", "sageattn")(q, k, v, tensor_layout="NHD", sm_scale=scale)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    out: Tensor = _function("xformers.ops", "memory_efficient_attention")(q, k, v, scale=scale)
    return out


@lru_cache
def _loaded(module: str, function: str) -> tuple[Callable[..., Any] | None, str | None]:
    """Return a library's function, or None and the reason."""
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return None, "not installed"
        return getattr(importlib.import_module(module), function), None
    except Exception as error:  # a library built for another torch fails in any way it likes
        first_line = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return None, f"installed, but does not load: {first_line}"


def _function(module: str, function: str) -> Callable[..., Any]:
    found = _loaded(module, function)[0]
    assert found is not None, f"{module} was not asked for with `Kernel.refuses`"
    return found


def _wants_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _range_text(lowest: Capability, highest: Capability) -> str:
    if highest >= _NEWEST:
        return f"{_text(lowest)} or newer"
    return _text(lowest) if lowest == highest else f"{_text(lowest)} to {_text(highest)}"


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def _device_text(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else f"device {str(device)!r}"


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_NEWEST = (99, 0)
_AMPERE_ON = (((8, 0), _NEWEST),)
_HOPPER = (((9, 0), (9, 0)),)
_BLACKWELL = ((10, 0), (11, 9))

SDPA = Kernel(name="sdpa", title="torch's own choice", compute=_sdpa, takes_bias=True)
CHUNKED = Kernel(
    name="chunked",
    title="plain torch, some queries at a time",
    compute=attend_in_chunks,
    takes_bias=True,
)
CUDNN = Kernel(
    name="sdpa_cudnn",
    title="torch's cuDNN attention",
    compute=_sdpa_by(SDPBackend.CUDNN_ATTENTION),
    capabilities=_AMPERE_ON,
    backend=SDPBackend.CUDNN_ATTENTION,
    takes_bias=True,
    cudnn_for_gradients=91501,
)
FLASH = Kernel(
    name="sdpa_flash",
    title="torch's FlashAttention 2",
    compute=_sdpa_by(SDPBackend.FLASH_ATTENTION),
    capabilities=_AMPERE_ON,
    backend=SDPBackend.FLASH_ATTENTION,
)
EFFICIENT = Kernel(
    name="sdpa_efficient",
    title="torch's memory-efficient attention",
    compute=_sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
    capabilities=(((5, 0), _NEWEST),),
    backend=SDPBackend.EFFICIENT_ATTENTION,
    takes_bias=True,
)


def _flash_kernel(
    version: int, module: str, largest_head: int, capabilities: tuple[CapabilityRange, ...], install: str
) -> Kernel:
    """A version of flash-attn: they share one call."""
    return Kernel(
        name=f"flash{version}",
        title=f"flash-attn {version}",
        compute=_flash(module),
        capabilities=capabilities,
        module=module,
        function="flash_attn_func",
        install=install,
        dtypes=_HALF,
        head_dims=range(8, largest_head + 1, 8),
    )


# name and what it is; order is that of listings
KERNELS = (
    SDPA,
    CUDNN,
    FLASH,
    EFFICIENT,
    _flash_kernel(2, "flash_attn", 256, _AMPERE_ON, "pip install flash-attn --no-build-isolation"),
    _flash_kernel(
        3, "flash_attn_interface", 256, _HOPPER, "build hopper/ of github.com/Dao-AILab/flash-attention"
    ),
    _flash_kernel(4, "flash_attn.cute", 128, (*_HOPPER, _BLACKWELL), "pip install flash-attn-4"),
    Kernel(
        name="sage",
        title="SageAttention (8-bit, lossy)",
        compute=_sage,
        capabilities=(((8, 0), (8, 0)), ((8, 6), (8, 6)), ((8, 9), (9, 0)), ((12, 0), (12, 0))),
        module="sageattention",
        function="sageattn",
        install="pip install sageattention",
        dtypes=_HALF,
        head_dims=range(1, 129),
        is_differentiable=False,
        is_exact=False,
    ),
    Kernel(
        name="xformers",
        title="xformers",
        compute=_xformers,
        capabilities=_AMPERE_ON,
        module="xformers.ops",
        function="memory_efficient_attention",
        install="pip install xformers",
        dtypes=_HALF,
        head_dims=range(8, 257, 8),
    ),
    CHUNKED,
)

"""Every kernel gives the formula; the one that runs is the one that was chosen, or the best that can."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth.cli.doctor import _attention
from diffsynth.errors import ArgumentError
from diffsynth.ops import attention, attention_chunked, attention_kernels
from diffsynth.ops.attention import attend, attention_kernel, describe_attention
from diffsynth.ops.attention_chunked import attend_in_chunks
from diffsynth.ops.attention_kernels import CHUNKED, CUDNN, EFFICIENT, FLASH, KERNELS, SDPA

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESENT = [kernel for kernel in KERNELS if kernel.unavailable(DEVICE) is None]
ROWS = {kernel.name: kernel for kernel in KERNELS}

# dtype, tolerance, and the reason for it
PARITY = [
    pytest.param(torch.float32, 2e-6, id="fp32-other-order-of-sums"),
    pytest.param(torch.bfloat16, 2e-2, id="bf16-8-bit-mantissa"),
]


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment is read once; each test here is a first use."""
    monkeypatch.delenv("DIFFSYNTH_ATTENTION", raising=False)
    attention._chosen_by_environment.cache_clear()
    yield
    attention._chosen_by_environment.cache_clear()
    attention_kernels._loaded.cache_clear()


def tensors(dtype: torch.dtype = torch.float32, d: int = 16, device: torch.device = CPU) -> list[Tensor]:
    """q of 37 tokens, k and v of 21, in 2 x 3 heads."""
    return [torch.randn(2, n, 3, d).to(device, dtype) for n in (37, 21, 21)]


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("blnd,bsnd->bnls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.double()
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v)


BIASES = [None, (1, 1, 1, 21), (1, 3, 37, 21), (2, 1, 37, 1), (37, 21)]


@pytest.mark.parametrize("kernel", PRESENT, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("dtype", "tolerance"), PARITY)
@pytest.mark.parametrize("bias_shape", BIASES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_present_kernels_agree_with_float64(kernel, dtype, tolerance, bias_shape, scale) -> None:
    q, k, v = tensors(dtype, 64 if DEVICE.type == "cuda" else 16, DEVICE)
    bias = None if bias_shape is None else torch.randn(bias_shape).to(DEVICE, dtype)
    if kernel.refuses(q, k, v, bias) is not None:
        pytest.skip(f"{kernel.name} {kernel.refuses(q, k, v, bias)}")
    made = kernel.compute(q, k, v, bias, scale)
    assert made.dtype == dtype and made.shape == q.shape
    wanted = reference(q, k, v, bias, scale)
    error = (made.double() - wanted).norm() / wanted.norm()
    assert error < (tolerance if kernel.is_exact else 0.05)  # 8-bit scores


def test_on_the_cpu_attend_is_sdpa_bit_for_bit() -> None:
    q, k, v = tensors()
    bias = torch.randn(1, 1, 1, 21)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias, scale=0.3
    ).transpose(1, 2)
    assert torch.equal(attend(q, k, v, bias=bias, scale=0.3), wanted)
    assert describe_attention("cpu") == "sdpa: torch's own choice on cpu"


class Largest(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.num_bytes = max(self.num_bytes, leaf.numel() * leaf.element_size())
        return made


LIMITS = [
    pytest.param(3 * 4 * 21 * 5, id="some-queries-of-a-head"),
    pytest.param(3 * 4 * 21 * 37 * 2, id="two-heads-at-once"),
    pytest.param(1, id="one-query"),
]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bias_shape", BIASES, ids=str)
def test_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, limit: int, bias_shape) -> None:
    monkeypatch.setattr(attention_chunked, "CHUNK_BYTES", limit)
    q, k, v = (t.requires_grad_() for t in tensors())
    bias = None if bias_shape is None else torch.randn(bias_shape, requires_grad=True)
    given = [t for t in (q, k, v, bias) if t is not None]
    pull = torch.randn(2, 37, 3, 16)
    wanted = reference(q, k, v, bias, 0.4)
    expected = torch.autograd.grad(wanted, given, pull.double())
    trained = attend_in_chunks(q, k, v, bias, 0.4)
    torch.testing.assert_close(trained, wanted.float(), atol=1e-6, rtol=1e-5)
    for made, grad in zip(torch.autograd.grad(trained, given, pull), expected, strict=True):
        torch.testing.assert_close(made, grad.float(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attend_in_chunks(q, k, v, bias, 0.4), trained)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_chunks_never_hold_more_than_their_limit(monkeypatch: pytest.MonkeyPatch, needs_grad: bool) -> None:
    limit = 128 << 10
    monkeypatch.setattr(attention_chunked, "CHUNK_BYTES", limit)
    q, k, v = (torch.randn(1, 300, 4, 8, dtype=torch.bfloat16, requires_grad=needs_grad) for _ in range(3))
    bias = torch.randn(1, 1, 1, 300, dtype=torch.bfloat16)
    with Largest() as seen:
        out = attend_in_chunks(q, k, v, bias, None)
        if needs_grad:
            out.sum().backward()
    # a third of the limit for scores; the whole of one head would be 360 KB
    assert limit / 6 < seen.num_bytes <= limit / 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_or_absent_kernel_lists_all_with_reasons(device: str, monkeypatch) -> None:
    capability = None if device == "cpu" else (8, 9)
    monkeypatch.setattr(attention_kernels, "capability_of", lambda device: capability)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ArgumentError, match="'flash9' is no kernel") as unknown:
        attention_kernel("flash9", device)
    text = str(unknown.value)
    assert all(f"\n  {kernel.name}: " in text for kernel in KERNELS) and "'auto'" in text
    assert "\n  sdpa: available" in text and "\n  chunked: available" in text
    with pytest.raises(ArgumentError, match=f"'flash3' cannot run on {device}: it needs") as absent:
        attention_kernel("flash3", device)
    if device == "cuda":
        assert "flash3: needs compute capability 9.0, this GPU has 8.9" in str(absent.value)
        with pytest.raises(ArgumentError, match=r"'sage' cannot run on cuda: it is (not|installed, but)"):
            attention_kernel("sage", device)
    else:
        assert "needs an NVIDIA GPU of compute capability 9.0, not the CPU" in str(absent.value)
    assert attention_kernel("auto", device) is attend


def test_a_kernel_chosen_by_name_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    chosen = attention_kernel("chunked", "cpu")
    assert repr(chosen) == "attention_kernel('chunked')"
    assert describe_attention("cpu", chosen).startswith("chunked, chosen by name; calls that it cannot take")
    assert describe_attention("cpu", attend) == describe_attention("cpu")
    monkeypatch.setattr(attention_chunked, "CHUNK_BYTES", 3 * 4 * 21 * 5)
    assert torch.equal(chosen(q, k, v), attend_in_chunks(q, k, v, None, None))


def test_the_environment_chooses_for_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    q, k, v = tensors(torch.bfloat16)
    monkeypatch.setenv("DIFFSYNTH_ATTENTION", "chunked")
    assert torch.equal(attend(q, k, v), attend_in_chunks(q, k, v, None, None))
    assert describe_attention("cpu").startswith(
        "chunked, chosen by DIFFSYNTH_ATTENTION; calls that it cannot"
    )
    monkeypatch.setenv("DIFFSYNTH_ATTENTION", "flash3")
    assert describe_attention("cpu").startswith("chunked")  # read once
    attention._chosen_by_environment.cache_clear()
    for ask in (lambda: attend(q, k, v), describe_attention):
        with pytest.raises(ArgumentError, match="DIFFSYNTH_ATTENTION=flash3: 'flash3' cannot run on cpu"):
            ask()


# what a library's call is given beside q, k, v, and what it returns: (out, log-sum-exp) in some versions
LIBRARIES = [
    pytest.param("flash2", {"softmax_scale": 0.3}, False, id="flash2"),
    pytest.param("flash3", {"softmax_scale": 0.3}, True, id="flash3-with-sums"),
    pytest.param("flash3", {"softmax_scale": 0.3}, False, id="flash3-without-sums"),
    pytest.param("flash4", {"softmax_scale": 0.3}, True, id="flash4"),
    pytest.param("sage", {"tensor_layout": "NHD", "sm_scale": 0.3}, False, id="sage"),
    pytest.param("xformers", {"scale": 0.3}, False, id="xformers"),
]


def install(monkeypatch: pytest.MonkeyPatch, name: str, gives_sums: bool = False) -> list[dict]:
    """Put a library in place whose call is plain attention; return the arguments of its calls."""
    row, calls = ROWS[name], []

    def call(q: Tensor, k: Tensor, v: Tensor, **given) -> object:
        calls.append(given)
        scale = next(value for key, value in given.items() if key.endswith("scale"))
        out = reference(q, k, v, None, scale).to(q.dtype)
        return (out, out[..., 0]) if gives_sums else out

    whole = ""
    for part in row.module.split("."):
        whole = f"{whole}.{part}".strip(".")
        module = ModuleType(whole)
        module.__spec__ = importlib.machinery.ModuleSpec(whole, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, whole, module)
    setattr(sys.modules[row.module], row.function, call)
    attention_kernels._loaded.cache_clear()
    monkeypatch.setattr(attention_kernels, "capability_of", lambda device: (9, 0))
    return calls


@pytest.mark.parametrize(("name", "given", "gives_sums"), LIBRARIES)
def test_libraries_are_called_in_their_own_form(monkeypatch, name, given, gives_sums) -> None:
    calls = install(monkeypatch, name, gives_sums)
    q, k, v = tensors(torch.bfloat16)
    chosen = attention_kernel(name, "cuda")
    torch.testing.assert_close(chosen(q, k, v, scale=0.3), reference(q, k, v, None, 0.3).bfloat16())
    assert calls == [given]


def test_calls_that_a_chosen_kernel_cannot_take_go_elsewhere_and_are_told_once(monkeypatch, caplog) -> None:
    calls = install(monkeypatch, "sage")
    caplog.set_level(logging.INFO, "diffsynth")
    chosen = attention_kernel("sage", "cuda")
    q, k, v = tensors(torch.bfloat16)
    bias = torch.randn(1, 1, 1, 21, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(chosen(q, k, v, bias=bias), attend(q, k, v, bias=bias))
        assert torch.equal(chosen(q.float(), k.float(), v.float()), attend(q.float(), k.float(), v.float()))
    wide = tensors(torch.bfloat16, d=160)
    assert torch.equal(chosen(*wide), attend(*wide))
    chosen(q.clone().requires_grad_(), k, v)
    assert calls == []
    assert [record.getMessage() for record in caplog.records] == [
        "Attention kernel sage takes no bias: such calls run on sdpa.",
        "Attention kernel sage takes float16 and bfloat16, not float32: such calls run on sdpa.",
        "Attention kernel sage takes heads of 1 to 128 in steps of 1, not of 160: such calls run on sdpa.",
        "Attention kernel sage has no gradient: such calls run on sdpa.",
    ]


class OnGPU:
    """What the choice asks of a tensor, for a GPU that is not here."""

    device = torch.device("cuda:0")
    requires_grad = False
    dtype = torch.bfloat16
    shape = (1, 64, 2, 128)


@pytest.mark.parametrize(
    ("capability", "fitting", "has_bias", "expected"),
    [
        pytest.param((9, 0), {CUDNN, FLASH, EFFICIENT}, False, CUDNN, id="hopper"),
        pytest.param((9, 0), {CUDNN, EFFICIENT}, True, EFFICIENT, id="hopper-bias"),
        pytest.param((9, 0), {FLASH, EFFICIENT}, False, FLASH, id="hopper-unfit-for-cudnn"),
        pytest.param((9, 0), {EFFICIENT}, False, SDPA, id="hopper-unfit-shape"),
        pytest.param((8, 9), {CUDNN, FLASH, EFFICIENT}, False, SDPA, id="ada"),
        pytest.param((10, 0), {CUDNN, EFFICIENT}, True, EFFICIENT, id="blackwell-bias"),
        pytest.param((12, 0), {CUDNN, FLASH, EFFICIENT}, False, SDPA, id="blackwell"),
        pytest.param((7, 5), set(), False, CHUNKED, id="turing-bf16"),
        pytest.param((7, 5), set(), True, CHUNKED, id="turing-bf16-bias"),
        pytest.param(None, {FLASH}, False, SDPA, id="amd"),
    ],
)
def test_the_automatic_choice(monkeypatch, capability, fitting, has_bias, expected) -> None:
    on_a_gpu(monkeypatch, capability, fitting)
    x = OnGPU()
    assert attention._automatic(x, x, x, torch.zeros(1) if has_bias else None) is expected
    described = describe_attention("cuda")
    assert described.startswith("sdpa_cudnn" if capability == (9, 0) else "sdpa:") and "chunked" in described


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, fitting: set) -> None:
    """A GPU on which torch's kernels of ``fitting`` take every call."""
    for module in (attention, attention_kernels):
        monkeypatch.setattr(module, "capability_of", lambda device: capability)

    def takes(q: object, k: object, v: object, bias: object, backends: tuple = ()) -> bool:
        return bool(fitting) if not backends else any(kernel.backend in backends for kernel in fitting)

    monkeypatch.setattr(attention_kernels, "torch_takes", takes)
    monkeypatch.setattr(attention, "torch_takes", takes)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize(
    ("version", "is_training", "is_right"),
    [
        (91002, True, False),
        (91500, True, False),
        (91501, True, True),
        (91002, False, True),
        (None, True, False),
    ],
)
def test_gradients_are_never_those_of_a_cudnn_that_computes_them_wrongly(
    monkeypatch, capability, version: int, is_training: bool, is_right: bool
) -> None:
    on_a_gpu(monkeypatch, capability, {CUDNN, FLASH, EFFICIENT})
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    x = OnGPU()
    x.requires_grad = is_training
    by_default = CUDNN if capability == (9, 0) else SDPA
    assert attention._automatic(x, x, x, None) is (by_default if is_right else FLASH)
    refusal = CUDNN.refuses(x, x, x, None)
    assert refusal is None if is_right else "9.15.1" in refusal


def test_the_doctor_lists_all_kernels_and_a_wrong_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_ATTENTION", "flash9")
    monkeypatch.setattr(attention_kernels, "capability_of", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    found = {finding.name: finding for finding in _attention()}
    assert set(found) == {"in use", *ROWS}
    assert found["in use"].found is None and "'flash9' is no kernel" in found["in use"].remedy
    assert found["sage"].remedy.endswith("; an alternative to sdpa: pip install sageattention")
    assert found["flash3"].found is None and found["flash3"].is_optional


@pytest.mark.gpu
def test_forcing_an_order_leaves_the_settings_of_torch_as_they_were() -> None:
    q, k, v = tensors(torch.bfloat16, 64, DEVICE)
    before = torch._C._get_sdp_priority_order()
    attention_kernel("sdpa_cudnn")(q, k, v)
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()

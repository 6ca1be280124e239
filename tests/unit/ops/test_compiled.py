"""Generated kernels give what the eager pieces give, and failing to compile costs nothing but time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diffsynth.errors import ArgumentError
from diffsynth.ops import compiled, fused
from diffsynth.ops.compiled import Compiler, Generated
from diffsynth.ops.fused import gated_add, modulated_layer_norm, rms_norm_heads, spans_of
from diffsynth.ops.rope import video_rotation

CPU = torch.device("cpu")
GENERATED = ("write_modulated_norm", "add_gated", "write_rms_norm", "write_rotated")
TOKENS = 96


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """A process that compiles on the CPU too, with no kernel generated yet."""

    class Everywhere(Compiler):
        def serves(self, x: Tensor) -> bool:
            return not (torch.is_grad_enabled() or self.has_failed)

    fresh = Everywhere()
    monkeypatch.setattr(compiled, "compiler", fresh)
    monkeypatch.setattr(fused, "compiler", fresh)
    for name in GENERATED:
        old = getattr(compiled, name)
        new = Generated(old.function, old._token_dims)
        monkeypatch.setattr(compiled, name, new)
        monkeypatch.setattr(fused, name, new)
    yield fresh


def record(into: list[str]) -> Callable:
    """A compiler that leaves functions as they are and notes their calls."""

    def compile(function: Callable, *, fullgraph: bool) -> Callable:
        assert fullgraph

        def call(*args: object) -> None:
            into.append(function.__name__)
            function(*args)

        return call

    return compile


def results(dtype: torch.dtype, clock: Tensor | None, batch: int, device: torch.device = CPU) -> list[Tensor]:
    """All that `fused` does to a stream of 96 tokens, with the same numbers at each call."""
    torch.manual_seed(3)
    width, heads = 64, 2
    times = 1 if clock is None else int(clock.max()) + 1
    x, y = (torch.randn(batch, TOKENS, width).to(device, dtype) for _ in range(2))
    shift, scale, gate = (torch.randn(batch, times, width).to(device) for _ in range(3))
    weight = (1 + 0.1 * torch.randn(width)).to(device, dtype)
    rotation = video_rotation((4, 4, 6), width // heads, device)
    spans = spans_of(clock, TOKENS)
    with torch.no_grad():
        made = [modulated_layer_norm(x, shift, scale, spans, 1e-6), gated_add(x, y, gate, spans)]
        assert made[1] is x  # in place
        made.append(rms_norm_heads(y.clone(), weight, 1e-6, heads, rotation))
        made.append(rms_norm_heads(y.clone(), weight, 1e-6, heads))
        made.append(rms_norm_heads(y.clone(), None, 1e-6, heads, rotation))
    return made


CLOCKS = {
    "one": None,
    "two-runs": (torch.arange(TOKENS) >= 20).long(),
    "every-token": torch.arange(TOKENS) * 5 % TOKENS,
}
# both round once to the stream's dtype; sums in another order may round to the neighbour
PARITY = [
    pytest.param(torch.float32, {"atol": 3e-6, "rtol": 1e-6}, id="fp32-other-order-of-sums"),
    pytest.param(torch.bfloat16, {"atol": 1e-5, "rtol": 2**-7}, id="bf16-last-bit"),
]


def assert_close(made: list[Tensor], wanted: list[Tensor], tolerance: dict[str, float]) -> None:
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PARITY)
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("batch", [1, 2])
def test_functions_to_be_compiled_equal_the_pieces(
    monkeypatch, request, dtype, tolerance, clock, batch
) -> None:
    wanted = results(dtype, CLOCKS[clock], batch)
    request.getfixturevalue("compiler")
    ran: list[str] = []
    monkeypatch.setattr(torch, "compile", record(ran))
    assert_close(results(dtype, CLOCKS[clock], batch), wanted, tolerance)
    num_spans = len(spans_of(CLOCKS[clock], TOKENS))
    # one fused kernel of torch already serves a single clock of a single sequence
    has_own = clock == "one" and batch == 1
    norms = [] if has_own else ["write_modulated_norm"] * num_spans
    assert ran == norms + ["add_gated"] * num_spans + ["write_rotated", "write_rms_norm", "write_rotated"]


@pytest.mark.parametrize("num_good_calls", [0, 1, 3])
def test_a_compiler_that_fails_is_left_alone(monkeypatch, request, caplog, num_good_calls: int) -> None:
    """Also between two spans of a sequence that is changed in place: none is worked on twice."""
    clock = CLOCKS["two-runs"]
    wanted = results(torch.float32, clock, 2)
    state = request.getfixturevalue("compiler")
    ran: list[str] = []

    def compile(function: Callable, *, fullgraph: bool) -> Callable:
        good = record(ran)(function, fullgraph=fullgraph)

        def call(*args: object) -> None:
            if len(ran) >= num_good_calls:
                raise RuntimeError("no C compiler\nmore lines")
            good(*args)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    for _ in range(2):
        assert_close(results(torch.float32, clock, 2), wanted, {"atol": 3e-6, "rtol": 1e-6})
    assert len(ran) == num_good_calls and state.has_failed
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "(RuntimeError: no C compiler)" in warnings[0].getMessage()


def test_every_kind_of_call_is_compiled_however_many_there_are(monkeypatch, compiler: Compiler) -> None:
    """The compiler takes eight variants of a function, and leaves sizes open that have differed."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: whole(f, fullgraph=fullgraph, backend=backend))
    kinds = [(width, dtype, batch) for width in (16, 32, 48, 64) for dtype in (torch.float32, torch.bfloat16)
             for batch in (1, 2)]  # fmt: skip
    with torch.no_grad():
        for width, dtype, batch in kinds:
            for tokens in (7, 9, 11):
                x, y = torch.randn(2, batch, tokens, width).to(dtype)
                assert fused.add_gated(x, y, torch.randn(batch, 1, width), None)
    assert not compiler.has_failed
    assert len(graphs) <= 2 * len(kinds), "one kernel serves every number of tokens"


def test_running_out_of_memory_is_no_fault_of_the_compiler(monkeypatch, compiler: Compiler) -> None:
    def compile(function: Callable, *, fullgraph: bool) -> Callable:
        def call(*args: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(torch.OutOfMemoryError):
        results(torch.float32, CLOCKS["two-runs"], 1)
    assert not compiler.has_failed


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("1", True), ("", True), ("0", False)])
def test_the_environment_switches_compiling_off(monkeypatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("DIFFSYNTH_COMPILE", raising=False)
    if value is not None:
        monkeypatch.setenv("DIFFSYNTH_COMPILE", value)
    compiled.is_switched_on.cache_clear()
    assert compiled.is_switched_on() is expected
    compiled.is_switched_on.cache_clear()


def test_a_wrong_switch_says_which_values_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_COMPILE", "yes")
    compiled.is_switched_on.cache_clear()
    with pytest.raises(ArgumentError, match=r"DIFFSYNTH_COMPILE is 'yes'; give 0 .* or 1"):
        compiled.is_switched_on()
    compiled.is_switched_on.cache_clear()


def test_nothing_is_compiled_on_the_cpu_or_in_training() -> None:
    with torch.no_grad():
        assert not Compiler().serves(torch.zeros(1))
    assert not Compiler().serves(torch.zeros(1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_kernels_equal_the_pieces(request: pytest.FixtureRequest) -> None:
    wanted = results(torch.bfloat16, CLOCKS["every-token"], 2)
    state = request.getfixturevalue("compiler")
    made = results(torch.bfloat16, CLOCKS["every-token"], 2)
    assert not state.has_failed
    assert_close(made, wanted, {"atol": 1e-5, "rtol": 2**-7})

    # What is generated allocates sums of each token at most, and no copy of the stream.
    x, y = (torch.randn(2, TOKENS, 64).bfloat16() for _ in range(2))
    table, rows = torch.randn(2, TOKENS, 64), CLOCKS["every-token"]
    out = torch.empty_like(x)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        assert fused.write_modulated_norm(out, x, table, table, rows, 1e-6)
        assert fused.add_gated(x, y, table, rows)
    sizes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(sizes) < x.nbytes // 4


@pytest.mark.gpu
@pytest.mark.parametrize("clock", CLOCKS)
def test_a_gpu_compiles_and_gives_what_the_pieces_give(monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(compiled.compiler, "serves", lambda x: False)
    wanted = results(torch.bfloat16, CLOCKS[clock], 2, gpu)
    monkeypatch.undo()
    made = results(torch.bfloat16, CLOCKS[clock], 2, gpu)
    assert not compiled.compiler.has_failed
    assert_close(made, wanted, {"atol": 1e-5, "rtol": 2**-7})

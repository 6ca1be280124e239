"""Blocks computed again, offloaded, streamed and compiled give the loss and the gradients of a plain step."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError
from diffsynth.ops.attention import attend
from diffsynth.training.offload import CheckpointOffload
from diffsynth.training.recompute import MODES, Mode, Recompute, StreamedBase, compile_blocks
from diffsynth.training.tuning import TuneConfig, tune
from diffsynth.vram_management.visit import at_once, in_order
from tests.unit.training.toys import CPU, LARGE, SHAPE, forward, step, stir, toy_dit, toy_vace

LORA = TuneConfig(rank=4, alpha=2.0)
NUM_BLOCKS = 4
Gradients = dict[str, Tensor]


def assert_same(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> None:
    """Bit by bit: the same kernels ran on the same numbers, on one thread."""
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert torch.equal(found[1][name], grad), name


@pytest.mark.parametrize("is_offloaded", [False, True], ids=["here", "offloaded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_checkpointed_equals_plain(kind: str, dtype: torch.dtype, mode: Mode, is_offloaded: bool) -> None:
    dit = toy_dit(dtype)
    tuned = tune(dit, (), TuneConfig(kind=kind, rank=4, alpha=2.0))  # type: ignore[arg-type]
    stir(tuned.parameters())
    shape = LARGE if is_offloaded else SHAPE
    expected = step(dit, tuned.parameters(), shape=shape)
    assert len(expected[1]) == len(tuned.parameters())
    offload = CheckpointOffload() if is_offloaded else None
    recompute = Recompute(mode, offload=offload)
    recompute.install([dit])
    for _ in range(2):
        assert_same(step(dit, tuned.parameters(), shape=shape), expected)
    if offload is not None:
        width = dtype.itemsize
        num_large = 0 if width == 2 else NUM_BLOCKS  # 55 KB are not worth it
        assert offload.counts.out == offload.counts.back == 2 * num_large
        assert offload.counts.host_bytes == num_large * 576 * 48 * width, "buffers serve the next step too"
        offload.close()
    recompute.remove()
    assert dit.run_block is at_once and dit.attention is attend
    assert_same(step(dit, tuned.parameters(), shape=shape), expected)


@pytest.mark.parametrize(("mode", "per_block"), [("full", 2), ("keep_attention", 1)])
def test_kept_attention_is_not_computed_again(mode: Mode, per_block: int) -> None:
    dit, calls = toy_dit(), [0]
    tuned = tune(dit, (), LORA)

    def counting(q: Tensor, k: Tensor, v: Tensor, **others: object) -> Tensor:
        calls[0] += q.shape[1] == k.shape[1]
        return attend(q, k, v, **others)  # type: ignore[arg-type]

    dit.attention = counting
    Recompute(mode).install([dit])
    step(dit, tuned.parameters())
    assert calls[0] == per_block * NUM_BLOCKS


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of distinct tensors that autograd holds between the passes, weights aside."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


def test_of_a_checkpointed_block_only_its_input_is_kept() -> None:
    dit = toy_dit()
    tuned = tune(dit, (), LORA)
    plain = saved_bytes(lambda: step(dit, tuned.parameters(), shape=LARGE)[0])
    Recompute().install([dit])
    u = 576 * 48 * 4
    lean = saved_bytes(lambda: step(dit, tuned.parameters(), shape=LARGE)[0])
    # 4 inputs, and what the head keeps of the last result: a few u
    assert lean < (NUM_BLOCKS + 4) * u < plain / 5


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("mode", MODES)
def test_streamed_equals_plain_with_one_copy_a_block_a_pass(kind: str, mode: Mode) -> None:
    dit = toy_dit()
    tuned = tune(dit, (), TuneConfig(kind=kind, rank=4, alpha=2.0))  # type: ignore[arg-type]
    stir(tuned.parameters())
    expected = step(dit, tuned.parameters())
    base = StreamedBase([dit], CPU)
    recompute = Recompute(mode, bring_back=base.bring_back)
    recompute.install([dit])
    resting = {name: p.data_ptr() for name, p in dit.named_parameters() if not p.requires_grad}
    for passes in range(1, 4):
        assert_same(step(dit, tuned.parameters()), expected)
        # Forward and back, and at either turn two blocks are still in their slots.
        assert base.counts[0].copies == passes * (2 * NUM_BLOCKS - 4) + 2
    assert base.counts[0].slots_made == 2
    with torch.no_grad():
        assert torch.equal(forward(dit)[0], expected[0])
    base.close()
    recompute.remove()
    assert dit.visit is in_order
    assert {n: p.data_ptr() for n, p in dit.named_parameters() if not p.requires_grad} == resting
    assert all(p.grad is None for p in dit.parameters() if not p.requires_grad)
    assert_same(step(dit, tuned.parameters()), expected)


def test_factors_are_no_part_of_the_stream() -> None:
    dit = toy_dit()
    tuned = tune(dit, (), LORA)
    before = {name: p.data_ptr() for name, p in tuned.parameters().items()}
    base = StreamedBase([dit], CPU)
    Recompute(bring_back=base.bring_back).install([dit])
    optimizer = torch.optim.SGD(tuned.parameters().values(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(float(step(dit, tuned.parameters())[0]))
        optimizer.step()
        assert {name: p.data_ptr() for name, p in tuned.parameters().items()} == before
    assert losses[2] < losses[0]
    trained = {name: p.clone() for name, p in tuned.parameters().items()}
    base.close()
    assert all(torch.equal(p, trained[name]) for name, p in tuned.parameters().items())


@pytest.mark.parametrize("networks", [("dit", "vace"), ("vace",)], ids=["both", "vace"])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["resident", "streamed"])
def test_vace_blocks_are_run_the_same_ways(networks: tuple[str, ...], is_streamed: bool) -> None:
    dit, vace = toy_dit(), toy_vace()
    tuned = tune(dit, (vace,), TuneConfig(rank=4, networks=networks))
    stir(tuned.parameters())
    expected = step(dit, tuned.parameters(), (vace,))
    assert any(name.startswith("vace_blocks") for name in expected[1])
    base = StreamedBase([dit, vace], CPU) if is_streamed else None
    Recompute("keep_attention", bring_back=base.bring_back if base else None).install([dit, vace])
    for _ in range(3):
        assert_same(step(dit, tuned.parameters(), (vace,)), expected)
    if base is not None:
        # Two blocks of VACE fit into its two slots: they came once.
        assert [counts.copies for counts in base.counts] == [3 * (2 * NUM_BLOCKS - 4) + 2, 2]
        base.close()


def test_step_that_an_error_cut_off_does_not_spoil_the_next() -> None:
    dit = toy_dit()
    tuned = tune(dit, (), LORA)
    expected = step(dit, tuned.parameters(), shape=LARGE)
    base, offload = StreamedBase([dit], CPU), CheckpointOffload()
    Recompute(offload=offload, bring_back=base.bring_back).install([dit])

    def broken(grad: Tensor) -> Tensor:
        raise KeyboardInterrupt

    middle = next(p for name, p in tuned.parameters().items() if name.startswith("blocks.2."))
    handle = middle.register_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        step(dit, tuned.parameters(), shape=LARGE)
    handle.remove()
    gc.collect()
    assert_same(step(dit, tuned.parameters(), shape=LARGE), expected)
    held = offload.counts.host_bytes
    step(dit, tuned.parameters(), shape=LARGE)
    assert offload.counts.host_bytes == held <= 2 * NUM_BLOCKS * 576 * 48 * 4, "buffers serve again"


def test_the_compiler_leaves_attention_out_in_training_and_in_validation() -> None:
    """Which kernel takes a call is asked of torch's C++ and of the hardware: it cannot be traced."""
    seen: list[bool] = []

    def untraceable(*tensors: Tensor, **options: object) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return attend(*tensors, **options)

    dit = toy_dit()
    tuned = tune(dit, (), LORA)
    expected = step(dit, tuned.parameters())
    dit.attention = untraceable
    torch._dynamo.reset()
    compile_blocks([dit], backend="eager")
    torch.testing.assert_close(step(dit, tuned.parameters())[0], expected[0])
    with torch.no_grad():
        forward(dit)
    assert len(seen) == 4 * NUM_BLOCKS and not any(seen)


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "keep_attention"])
def test_compiled_blocks_give_the_same_within_rounding(mode: Mode) -> None:
    dit = toy_dit()
    tuned = tune(dit, (), LORA)
    stir(tuned.parameters())
    loss, grads = step(dit, tuned.parameters())
    base = StreamedBase([dit], CPU)
    Recompute(mode, bring_back=base.bring_back).install([dit])
    torch._dynamo.reset()
    compile_blocks([dit], backend="aot_eager")
    compiled_loss, compiled = step(dit, tuned.parameters())
    # The same formulas, decomposed into other kernels: fp32 rounding of sums of a few hundred terms.
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(compiled[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    base.close()


def test_unknown_mode_is_named() -> None:
    with pytest.raises(ArgumentError, match="known: full, keep_attention"):
        Recompute("half")  # type: ignore[arg-type]

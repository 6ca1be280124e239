"""Blocks stream through slots: the same numbers, one copy a block a pass, nothing copied back or grown."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.timeline import GivenTimes
from diffsynth.errors import ArgumentError, MovedModelError
from diffsynth.vram_management.copiers import FlatSource, Mark, Source, ThreadCopier, Transfer
from diffsynth.vram_management.flat import ALIGNMENT, FlatLayout
from diffsynth.vram_management.streaming import BlockStream, Host
from diffsynth.vram_management.visit import Visit, in_order

WIDTH, NUM_BLOCKS = 16, 7
CPU = torch.device("cpu")


class Block(nn.Module):
    key_layers = ("k.",)

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(WIDTH, WIDTH)  # stands before the others, and travels behind them
        self.rise, self.fall = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.register_buffer("gain", torch.full((1,), 0.5, dtype=torch.float16))

    def forward(self, x: Tensor, uses_keys: bool) -> Tensor:
        if uses_keys:
            x = x + self.k(x)
        return x + self.fall(torch.relu(self.rise(x))) * self.gain


@pytest.fixture
def blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(NUM_BLOCKS)).requires_grad_(False)


def run(visit: Visit, blocks: nn.ModuleList, *, has_keys: bool = False) -> Tensor:
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
    for block in visit(blocks, has_keys=has_keys):
        x = block(x, not has_keys)
        x = block(x, not has_keys)  # as for the second side of the guidance
    return x


def resting(blocks: nn.ModuleList) -> list[int]:
    return [t.data_ptr() for t in (*blocks.parameters(), *blocks.buffers())]


@pytest.mark.parametrize("host", ["pageable", "ring"])
@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("resident", [(), (3,), (0, 2, 4, 6), range(NUM_BLOCKS)], ids=len)
def test_streamed_equals_plain(
    blocks: nn.ModuleList, host: Host, num_slots: int, resident: Sequence[int]
) -> None:
    expected = {has_keys: run(in_order, blocks, has_keys=has_keys) for has_keys in (False, True)}
    stream = BlockStream(blocks, device=CPU, resident=resident, num_slots=num_slots, host=host)
    for has_keys in (False, True, True, False, True):
        assert torch.equal(run(stream, blocks, has_keys=has_keys), expected[has_keys])
    stream.close()
    assert torch.equal(run(in_order, blocks), expected[False])


def test_each_block_is_copied_once_a_pass_into_slots_that_are_made_once(blocks: nn.ModuleList) -> None:
    stream = BlockStream(blocks, device=CPU, resident=(3,), host="pageable")
    streamed = NUM_BLOCKS - 1
    run(stream, blocks)
    assert stream.counts.copies == streamed + 2, "all, and the first two of the next pass"
    for passes in range(2, 5):
        run(stream, blocks)
        assert stream.counts.copies == passes * streamed + 2
    assert stream.counts.slots_made == 2
    assert stream.counts.bytes == stream.counts.copies * stream.slot_bytes
    stream.close()


def test_layers_of_kept_keys_do_not_travel(blocks: nn.ModuleList) -> None:
    layout = FlatLayout(blocks[0])
    stream = BlockStream(blocks, device=CPU, host="pageable")
    run(stream, blocks)
    run(stream, blocks, has_keys=True)  # its first two came whole, at the end of the pass before
    before = stream.counts.bytes
    run(stream, blocks, has_keys=True)
    assert stream.counts.bytes - before == NUM_BLOCKS * layout.bytes_without_keys
    assert layout.num_bytes - layout.bytes_without_keys == WIDTH * WIDTH * 4 + ALIGNMENT
    stream.close()


def test_blocks_rest_in_one_flat_buffer_and_stand_for_it_between_turns(blocks: nn.ModuleList) -> None:
    stream = BlockStream(blocks, device=CPU, host="pageable")
    rest, others = resting(blocks), resting(blocks[1:])
    first = blocks[0].rise.weight.data.untyped_storage()
    assert first.data_ptr() == blocks[0].k.weight.data.untyped_storage().data_ptr()
    walk = stream(blocks)
    next(walk)
    assert not set(resting(blocks[:1])) & set(rest) and resting(blocks[1:]) == others
    walk.close()
    assert resting(blocks) == rest
    stream.close()
    assert resting(blocks) == rest


def test_a_ring_reads_the_weights_where_they_were_and_holds_two_blocks(blocks: nn.ModuleList) -> None:
    rest = resting(blocks)
    stream = BlockStream(blocks, device=CPU, host="ring")
    run(stream, blocks)
    assert resting(blocks) == rest
    stream.close()


def test_the_walk_after_an_exception_is_right_even_while_the_exception_is_held(blocks: nn.ModuleList) -> None:
    expected = run(in_order, blocks)
    stream = BlockStream(blocks, device=CPU, host="pageable")

    def fail_at(turn: int) -> None:
        for index, block in enumerate(stream(blocks)):
            block(torch.ones(1, WIDTH), True)
            if index == turn:
                raise RuntimeError("in the middle")

    held: list[BaseException] = []
    for turn in (0, 1, 4, NUM_BLOCKS - 1):
        try:
            fail_at(turn)
        except RuntimeError as error:
            held.append(error)  # its traceback keeps the walk open
        walk = stream(blocks)
        assert next(walk) is blocks[0]
        held.clear()
        gc.collect()  # the broken walk is closed now, in the middle of this one
        assert blocks[0].rise.weight.data_ptr() != stream._rested[0].resting[0].data_ptr()
        walk.close()
        assert torch.equal(run(stream, blocks), expected)
    stream.close()


def test_an_error_on_the_way_is_raised_where_the_block_is_needed(blocks: nn.ModuleList) -> None:
    class Broken(ThreadCopier):
        is_broken = True

        def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
            if self.is_broken:
                source = FlatSource(torch.empty(0, dtype=torch.uint8))
            return super().fetch(target, source, start, stop, free)

    copier = Broken()
    expected = run(in_order, blocks)
    stream = BlockStream(blocks, device=CPU, host="pageable", copier=copier)
    with pytest.raises(RuntimeError):
        run(stream, blocks)
    copier.is_broken = False
    with pytest.raises(RuntimeError):
        run(stream, blocks)  # the second block was on its way too
    assert torch.equal(run(stream, blocks), expected)
    stream.close()


def test_a_model_moved_by_hand_is_told(blocks: nn.ModuleList) -> None:
    stream = BlockStream(blocks, device=CPU, host="pageable")
    run(stream, blocks)
    stream.stop()
    blocks[2].rise.weight.data = blocks[2].rise.weight.data.clone()
    with pytest.raises(MovedModelError, match=r"block 2 .*disable_vram_management"):
        run(stream, blocks)


def test_one_slot_is_refused(blocks: nn.ModuleList) -> None:
    with pytest.raises(ArgumentError, match="num_slots is 1"):
        BlockStream(blocks, device=CPU, num_slots=1)


def test_another_choice_of_resident_blocks_keeps_the_buffers(blocks: nn.ModuleList) -> None:
    expected = run(in_order, blocks)
    stream = BlockStream(blocks, device=CPU, host="pageable")
    rest = resting(blocks)
    for resident, num_slots in (((0, 3), 3), ((1,), 2), ((), 3)):
        stream.arrange(resident, num_slots)
        assert torch.equal(run(stream, blocks), expected)
        stream.stop()
        assert resting(blocks) == rest
    stream.close()


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize(("copy_s", "compute_s"), [(1.0, 3.0), (1.0, 1.0), (3.0, 1.0)])
def test_copies_hide_behind_the_compute(
    blocks: nn.ModuleList, copy_s: float, compute_s: float, num_slots: int
) -> None:
    clock = GivenTimes(copy_s=copy_s, compute_s=compute_s)
    stream = BlockStream(blocks, device=CPU, num_slots=num_slots, host="pageable", copier=clock)
    passes = 10
    for _ in range(passes):
        clock.compute(stream(blocks))
    longest = passes * NUM_BLOCKS * max(copy_s, compute_s)
    assert clock.compute_at <= 1.05 * longest + copy_s
    assert clock.compute_at >= passes * NUM_BLOCKS * compute_s


@pytest.mark.parametrize("host", ["pageable", "ring"])
def test_a_call_in_inference_mode_streams_as_any_other(blocks: nn.ModuleList, host: Host) -> None:
    """Its threads and later calls are in no such mode, and write to what it has made."""
    plain = run(in_order, blocks)
    stream = BlockStream(blocks, device=CPU, host=host, resident=(1,))
    with torch.inference_mode():
        assert torch.equal(run(stream, blocks), plain)
        assert torch.equal(run(stream, blocks), plain)
    assert torch.equal(run(stream, blocks), plain)
    stream.close()

"""One stream follows another on the same memory: its blocks set out before the other has ended."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.timeline import GivenTimes
from diffsynth.vram_management.memory_plan import MemoryPlan, NetworkPlan
from diffsynth.vram_management.residency import Residency
from diffsynth.vram_management.streaming import BlockStream, Host
from diffsynth.vram_management.visit import in_order
from tests.unit.vram_management.plans import dit_14b, plan, weights
from tests.unit.vram_management.test_residency_plans import AWAY, Network
from tests.unit.vram_management.test_streaming import CPU, NUM_BLOCKS, Block, resting, run

RESIDENT = [(), (3,), (0, 2, 5), range(NUM_BLOCKS)]


@pytest.fixture
def pair() -> tuple[nn.ModuleList, nn.ModuleList]:
    torch.manual_seed(0)
    high, low = (nn.ModuleList(Block() for _ in range(NUM_BLOCKS)).requires_grad_(False) for _ in range(2))
    return high, low


def streams(
    pair: tuple[nn.ModuleList, nn.ModuleList],
    resident: Sequence[int] = (),
    host: Host = "pageable",
    num_slots: int = 2,
    copier: GivenTimes | None = None,
) -> tuple[BlockStream, BlockStream]:
    high, low = (
        BlockStream(
            list(blocks), device=CPU, resident=resident, num_slots=num_slots, host=host, rests_all=True,
            copier=copier,
        )
        for blocks in pair
    )  # fmt: skip
    return high, low


@pytest.mark.parametrize("host", ["pageable", "ring"])
@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("resident", RESIDENT, ids=len)
def test_both_streams_compute_what_plain_blocks_do(
    pair: tuple[nn.ModuleList, nn.ModuleList], resident: Sequence[int], host: Host, num_slots: int
) -> None:
    expected = [run(in_order, blocks) for blocks in pair]
    high, low = streams(pair, resident, host, num_slots)
    rest = [resting(blocks) for blocks in pair]
    for _ in range(2):  # two generations
        assert torch.equal(run(high, pair[0]), expected[0])
        high.hand_over(low)
        assert torch.equal(run(high, pair[0]), expected[0])
        high.stop()
        made = low.counts.slots_made
        for _ in range(2):
            assert torch.equal(run(low, pair[1]), expected[1])
        assert low.counts.slots_made == made == 0, "it has the slots of the other"
        low.stop()
        assert [resting(blocks) for blocks in pair] == rest
    high.close()
    low.close()
    assert torch.equal(run(in_order, pair[1]), expected[1])


@pytest.mark.parametrize("host", ["pageable", "ring"])
def test_a_copier_serves_both_and_ends_with_the_last(
    pair: tuple[nn.ModuleList, nn.ModuleList], host: Host
) -> None:
    high, low = streams(pair, (3,), host)
    run(high, pair[0])
    high.hand_over(low)
    run(high, pair[0])
    assert low._copier is high._copier is not None
    high.stop()
    run(low, pair[1])
    copier = low._copier
    low.stop()
    assert copier is not None
    with pytest.raises(RuntimeError, match="shutdown"):
        copier.fetch(torch.empty(1), low._rested[0].source, 0, 1, lambda: None)


def test_no_block_of_the_successor_is_sent_twice_and_none_of_the_first_in_vain(
    pair: tuple[nn.ModuleList, nn.ModuleList],
) -> None:
    high, low = streams(pair, (3,))
    run(high, pair[0])
    high.hand_over(low)
    run(high, pair[0])
    assert high.counts.copies == 2 * (NUM_BLOCKS - 1) + 1, "each streamed block twice, the resident one once"
    assert low.counts.copies == 3, "two slots, and the resident block in its twin's place"
    high.stop()
    run(low, pair[1])
    assert low.counts.copies == (NUM_BLOCKS - 1) + 1 + 2, "all once, and the first two of the next pass"
    low.stop()


@pytest.mark.parametrize("host", ["pageable", "ring"])
def test_a_walk_that_was_not_the_last_takes_everything_back(
    pair: tuple[nn.ModuleList, nn.ModuleList], host: Host
) -> None:
    expected = [run(in_order, blocks) for blocks in pair]
    high, low = streams(pair, (1, 4), host)
    run(high, pair[0])
    high.hand_over(low)
    for _ in range(3):
        assert torch.equal(run(high, pair[0]), expected[0])
    high.stop()
    assert torch.equal(run(low, pair[1]), expected[1])
    low.stop()
    assert torch.equal(run(high, pair[0]), expected[0])


def test_who_was_sent_ahead_in_vain_is_stopped_without_harm(
    pair: tuple[nn.ModuleList, nn.ModuleList],
) -> None:
    expected = [run(in_order, blocks) for blocks in pair]
    high, low = streams(pair, (3,))
    run(high, pair[0])
    high.hand_over(low)
    with pytest.raises(KeyError):
        for index, _ in enumerate(high(pair[0])):
            if index == NUM_BLOCKS - 1:
                raise KeyError("in the middle of the last walk")
    high.stop()
    low.stop()
    assert [run(in_order, blocks).tolist() for blocks in pair] == [made.tolist() for made in expected]


@pytest.mark.parametrize("resident", [(), (1, 3, 5)], ids=len)
@pytest.mark.parametrize(("copy_s", "compute_s"), [(1.0, 3.0), (1.0, 1.0), (3.0, 1.0)])
def test_at_the_switch_at_most_one_block_copy_is_waited_for(
    pair: tuple[nn.ModuleList, nn.ModuleList], copy_s: float, compute_s: float, resident: Sequence[int]
) -> None:
    clock = GivenTimes(copy_s=copy_s, compute_s=compute_s)
    high, low = streams(pair, resident, copier=clock)
    clock.compute(high(pair[0]))
    high.hand_over(low)
    clock.compute(high(pair[0]))
    before = clock.compute_at
    high.stop()
    walk = low(pair[1])
    next(walk)
    assert clock.compute_at - before <= copy_s
    if copy_s <= compute_s and not resident:
        assert clock.compute_at == before, "copies hide behind the last block of the other"
    walk.close()
    low.stop()


def test_without_a_hand_over_the_first_block_is_waited_for_and_slots_are_made_anew(
    pair: tuple[nn.ModuleList, nn.ModuleList],
) -> None:
    clock = GivenTimes(copy_s=1.0, compute_s=3.0)
    high, low = streams(pair, copier=clock)
    clock.compute(high(pair[0]))
    before = clock.compute_at
    high.stop()
    clock.copy_at = max(clock.copy_at, before)  # nobody could ask for it earlier
    walk = low(pair[1])
    next(walk)
    assert clock.compute_at >= before + 1.0 and low.counts.slots_made == 2
    walk.close()
    low.stop()


def test_smaller_slots_are_not_taken_over() -> None:
    small = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).requires_grad_(False)
    large = nn.ModuleList(Block() for _ in range(3)).requires_grad_(False)
    expected = run(in_order, large)
    first, second = streams((small, large), (1,))
    for _ in first(small):
        pass
    first.hand_over(second)
    for _ in first(small):
        pass
    assert second.counts.copies == 0
    first.stop()
    assert torch.equal(run(second, large), expected) and second.counts.slots_made == 2
    second.stop()


def plans(host: Host = "pageable") -> dict[str, NetworkPlan]:
    return {
        name: NetworkPlan(
            network=name, where="streamed", num_blocks=5, num_slots=2, host=host, resident_blocks=(2,),
            is_of_pair=True,
        )
        for name in ("dit", "dit_low_noise")
    }  # fmt: skip


@pytest.mark.parametrize("host", ["pageable", "ring"])
def test_of_two_experts_only_one_is_on_the_device_once_the_other_is_entered(host: Host) -> None:
    high, low = Network(), Network()
    expected = [high(), low()]
    rest = [network.norm.weight.data_ptr() for network in (high, low)]
    residency = Residency({"dit": high, "dit_low_noise": low}, AWAY)
    residency.arrange(plans(host))
    for _ in range(2):
        residency.enter("dit")
        assert torch.equal(high(), expected[0])
        residency.send_ahead("dit_low_noise")
        assert torch.equal(high(), expected[0]) and low.norm.weight.data_ptr() == rest[1]
        counts = residency.counts("dit_low_noise")
        assert counts is not None
        before = counts.copies
        residency.enter("dit_low_noise")
        assert counts.copies == before and counts.slots_made == 0, "what it needs first was on its way"
        assert high.norm.weight.data_ptr() == rest[0] and low.norm.weight.data_ptr() != rest[1]
        assert torch.equal(low(), expected[1])
    residency.close()
    assert torch.equal(high(), expected[0]) and torch.equal(low(), expected[1])


def test_an_expert_that_was_sent_ahead_and_not_entered_goes_back() -> None:
    high, low = Network(), Network()
    expected: list[Tensor] = [high(), low()]
    residency = Residency({"dit": high, "dit_low_noise": low, "vae": nn.Linear(2, 2)}, AWAY)
    residency.arrange(plans())
    residency.enter("dit")
    residency.send_ahead("dit_low_noise")
    residency.enter("vae")
    guest = residency._guests["dit_low_noise"]
    assert guest.stream._copier is None and guest._rest._coming is None  # type: ignore[attr-defined]
    assert torch.equal(high(), expected[0]) and torch.equal(low(), expected[1])


def test_without_a_plan_nobody_is_sent_ahead() -> None:
    high, low = Network(), Network()
    residency = Residency({"dit": high, "dit_low_noise": low}, AWAY)
    residency.enter("dit")
    residency.send_ahead("dit_low_noise")
    assert residency._guests["dit_low_noise"]._coming is None  # type: ignore[attr-defined]
    residency.release()


def two_14b(**request: object) -> MemoryPlan:
    both = (*dit_14b(), *weights("dit_low_noise", "wan2.2_t2v_a14b"))
    return plan(both, vram_limit_gib=8, **request)


def test_the_plan_pins_both_experts_where_there_is_room_and_else_one_ring() -> None:
    pinned = two_14b(ram_limit_gib=64)
    assert {network.host for network in pinned.networks.values()} == {"pinned"}
    assert 52e9 < pinned.pinned_bytes < 58e9, "all blocks of both"
    assert any("Both experts rest in pinned memory" in note for note in pinned.notes)
    ring = two_14b(ram_limit_gib=40)
    assert {network.host for network in ring.networks.values()} == {"ring"}
    assert ring.pinned_bytes < 1.5e9, "two blocks"
    assert any("read through one pinned ring" in note for note in ring.notes)
    assert max(p.peak_bytes for p in pinned.phases) <= 8 * 2**30


def test_what_comes_early_is_counted_in_the_phase_of_the_first_expert() -> None:
    first, second = two_14b().phases
    size = sum(layer.num_bytes for layer in dit_14b() if not layer.name.startswith("blocks."))
    assert first.weight_bytes - second.weight_bytes == size

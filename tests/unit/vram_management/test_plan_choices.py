"""What the plan chooses under each limit: blocks that stay, slots, kept keys, tiles, phases of networks."""

from __future__ import annotations

import pytest

from diffsynth.errors import MemoryBudgetError
from diffsynth.vram_management.plan import MemoryPlan, Rates, layers_of_shapes, spread
from tests.unit.checkpoints.weights import manifests
from tests.unit.vram_management.plans import (
    GIB,
    H100,
    LARGE,
    PICTURE,
    dit_14b,
    phase,
    pipeline_14b,
    plan,
    weights,
)


def test_without_limits_everything_stays() -> None:
    found = plan(pipeline_14b())
    assert {network.where for network in found.networks.values()} == {"resident"}
    assert (found.verdict, found.copy_s, found.tiled_vae) == ("resident", 0.0, False)
    assert found.peak_bytes > sum(network.weight_bytes for network in found.networks.values())


def test_where_compute_hides_the_copies_the_plan_is_lean() -> None:
    found = plan(dit_14b(), vram_limit_gib=12)
    assert found.verdict == "compute-bound" and found.networks["dit"].num_slots == 2
    assert not found.interleaves_branches and not found.keeps_keys and found.ffn_chunk_tokens is None


def test_where_copies_are_waited_for_they_are_halved_and_keys_kept() -> None:
    lean = plan(dit_14b(), num_persistent_param_in_dit=0, rates=Rates(tflops=1e6, copy_gbs=25), **PICTURE)
    assert lean.interleaves_branches and lean.keeps_keys and lean.verdict == "copy-bound"
    plain = 2 * lean.networks["dit"].num_blocks * 702.8e6 / 25e9
    assert lean.copy_s <= 0.45 * plain
    alone = plan(dit_14b(), num_persistent_param_in_dit=0, rates=H100, num_branches=1, **PICTURE)
    assert not alone.interleaves_branches, "there is nothing to interleave with"


def test_what_does_not_fit_is_not_chosen() -> None:
    def tight(extra: float) -> MemoryPlan:
        return plan(dit_14b(), vram_limit_gib=minimum.minimum_gib + extra, rates=H100, **PICTURE)

    with pytest.raises(MemoryBudgetError) as refused:
        plan(dit_14b(), vram_limit_gib=0.5, rates=H100, **PICTURE)
    minimum = refused.value
    assert not tight(0.0).interleaves_branches and not tight(0.0).keeps_keys
    assert tight(0.1).interleaves_branches, "one more stream of a picture is small"
    assert not tight(0.1).keeps_keys, "839 MB of keys are not"
    assert tight(1.0).keeps_keys


def test_a_third_slot_comes_where_copies_and_compute_take_about_as_long() -> None:
    lean = plan(dit_14b(), num_persistent_param_in_dit=0)
    balanced = Rates(copy_gbs=25 * lean.copy_s / lean.compute_s)
    assert lean.networks["dit"].num_slots == 2
    assert plan(dit_14b(), num_persistent_param_in_dit=0, rates=balanced).networks["dit"].num_slots == 3
    with pytest.raises(MemoryBudgetError) as refused:
        plan(dit_14b(), vram_limit_gib=1, rates=balanced)
    held = plan(dit_14b(), vram_limit_gib=refused.value.minimum_gib, rates=balanced)
    assert held.networks["dit"].num_slots == 2, "there is no room for a third"


def test_more_room_keeps_more_blocks_and_never_takes_longer() -> None:
    plans = [plan(pipeline_14b(), vram_limit_gib=gib) for gib in (5, 8, 12, 16, 24, 32, 48)]
    counts = [
        len(found.networks["dit"].resident_blocks) if found.verdict != "resident" else 40 for found in plans
    ]
    assert counts == sorted(counts) and counts[0] < counts[2] < counts[-1] == 40
    times = [found.copy_s for found in plans]
    assert times == sorted(times, reverse=True)
    for gib, found in zip((8, 12, 16, 24), plans[1:5], strict=True):
        assert 0.9 * gib * GIB < found.peak_bytes + found.reserve_bytes <= gib * GIB


def test_the_last_blocks_stay_together_or_not_at_all() -> None:
    for gib in (20, 24, 26, 27, 28, 29, 30, 31):
        network = plan(dit_14b(), vram_limit_gib=gib).networks["dit"]
        if network.where == "streamed":
            assert network.num_blocks - len(network.resident_blocks) > network.num_slots


@pytest.mark.parametrize(("wished", "count"), [(0, 0), (7_000_000_000, 19), (14_288_491_584, 40)])
def test_a_number_of_parameters_keeps_its_share_of_blocks(wished: int, count: int) -> None:
    found = plan(pipeline_14b(), num_persistent_param_in_dit=wished)
    network = found.networks["dit"]
    if count == 40:
        assert network.where == "visits" and found.verdict == "resident"
    else:
        assert network.resident_blocks == spread(40, count)
    assert found.networks["text_encoder"].where == ("visits" if count else "streamed")
    assert found.peak_bytes == phase(found, "dit").peak_bytes or found.peak_bytes < 4.5e9


def test_two_experts_have_a_phase_each() -> None:
    both = (*dit_14b(), *weights("dit_low_noise", "wan2.1_t2v_14b"))
    one, two = plan(dit_14b(), vram_limit_gib=24), plan(both, vram_limit_gib=24)
    assert [p.name for p in two.phases] == ["dit", "dit_low_noise"]
    counts = [len(found.resident_blocks) for found in (one.networks["dit"], two.networks["dit"])]
    assert two.networks["dit_low_noise"].resident_blocks == two.networks["dit"].resident_blocks
    assert 0 <= counts[0] - counts[1] <= 1, "what is in no block of the other expert comes early"
    large = plan(both, vram_limit_gib=40)
    assert {network.where for network in large.networks.values()} == {"visits"}
    assert {network.where for network in plan(both, vram_limit_gib=80).networks.values()} == {"resident"}


def test_adapters_are_in_the_phase_of_their_dit() -> None:
    shapes = manifests()["wan2.1_vace_14b_module_only"]
    vace = layers_of_shapes("vace", shapes, dict.fromkeys(shapes, "BF16"))
    bare, found = plan(dit_14b(), vram_limit_gib=24), plan([*dit_14b(), *vace], vram_limit_gib=24)
    assert phase(found, "dit").networks == ("dit", "vace") and found.networks["vace"].num_blocks == 8
    stream = 32760 * 5120 * 2
    hints = phase(found, "dit").activation_bytes - phase(bare, "dit").activation_bytes
    assert hints == stream, "VACE has a stream of its own; each hint is added at once"
    assert len(found.networks["dit"].resident_blocks) < len(bare.networks["dit"].resident_blocks)


def test_a_dit_stays_where_streaming_the_text_encoder_makes_room() -> None:
    found = plan(pipeline_14b(), vram_limit_gib=36)
    assert found.networks["dit"].where == "resident" and found.networks["text_encoder"].where == "streamed"


def test_tiles_where_the_whole_picture_does_not_fit() -> None:
    assert not plan(pipeline_14b(), vram_limit_gib=12, **LARGE).tiled_vae
    found = plan(pipeline_14b(), vram_limit_gib=7, **LARGE)
    assert found.tiled_vae and phase(found, "vae").peak_bytes < 3e9
    assert any("tiles" in note for note in found.notes)


def test_fp8_halves_what_travels_and_needs_no_larger_device() -> None:
    wide, narrow = (plan(dit_14b(dtype), num_persistent_param_in_dit=0) for dtype in ("BF16", "F8_E4M3"))
    # the first and the last block stay wide
    share = narrow.networks["dit"].streamed_bytes / wide.networks["dit"].streamed_bytes
    assert share == pytest.approx((38 / 2 + 2) / 40, rel=0.01)
    assert phase(narrow, "dit").slot_bytes == phase(wide, "dit").slot_bytes
    widened = phase(narrow, "dit").activation_bytes - phase(wide, "dit").activation_bytes
    assert widened == 5120 * 13824 * 2, "one matrix, just before its use"


def test_products_in_fp8_take_a_byte_for_each_number_of_the_tokens() -> None:
    streamed = {"num_persistent_param_in_dit": 0, "num_branches": 1, **LARGE}
    widened, products = (
        phase(plan(dit_14b("F8_E4M3"), multiplies_fp8=way, **streamed), "dit").activation_bytes
        for way in (False, True)
    )
    tokens, dim, ffn_dim = 21 * 45 * 80, 5120, 13824
    assert products - widened == tokens * dim - dim * ffn_dim * 2  # and no wide matrix beside them

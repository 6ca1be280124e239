"""The plan's arithmetic by hand, its choices one by one, and its constants held equal to the code's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from diffsynth.checkpoints.dit_sizes import dit_config
from diffsynth.checkpoints.hints import Hints
from diffsynth.errors import ArgumentError, MemoryBudgetError
from diffsynth.vram_management import activations, layers
from diffsynth.vram_management.plan import (
    DiTSizes,
    LayerSpec,
    MemoryPlan,
    Rates,
    layers_of_module,
    layers_of_shapes,
    plan_memory,
    spread,
)
from tests.unit.checkpoints.weights import manifests

GIB = 2**30
SMALL = {"height": 480, "width": 832, "num_frames": 81}
LARGE = {"height": 720, "width": 1280, "num_frames": 81}
PICTURE = {"height": 480, "width": 832, "num_frames": 1}  # few tokens: copies take longer than compute
H100 = Rates(tflops=650)


@cache
def weights(network: str, model: str, dtype: str = "BF16") -> tuple[LayerSpec, ...]:
    shapes = manifests()[model]
    return tuple(layers_of_shapes(network, shapes, dict.fromkeys(shapes, "BF16"), stored_dtype=dtype))


@cache
def dit_sizes(model: str = "wan2.1_t2v_14b") -> DiTSizes:
    return DiTSizes.from_config(dit_config(manifests()[model], Hints()))


@cache
def dit_14b(dtype: str = "BF16") -> tuple[LayerSpec, ...]:
    return weights("dit", "wan2.1_t2v_14b", dtype)


def pipeline_14b(dtype: str = "BF16") -> tuple[LayerSpec, ...]:
    return (
        *dit_14b(dtype),
        *weights("text_encoder", "umt5_xxl_enc_bf16", dtype),
        *weights("vae", "wan2.1_vae", dtype),
    )


def plan(tensors: Sequence[LayerSpec], **request: Any) -> MemoryPlan:
    return plan_memory(tensors, **{"dit": dit_sizes(), **SMALL, **request})


def phase(plan: MemoryPlan, name: str) -> Any:
    return next(phase for phase in plan.phases if phase.name == name)


# the arithmetic


@pytest.mark.parametrize(
    ("num_blocks", "num_resident", "chosen"),
    [(40, 0, ()), (4, 1, (2,)), (6, 2, (1, 4)), (5, 5, (0, 1, 2, 3, 4)), (40, 4, (5, 15, 25, 35))],
)
def test_resident_blocks_are_spread_evenly(
    num_blocks: int, num_resident: int, chosen: tuple[int, ...]
) -> None:
    assert spread(num_blocks, num_resident) == chosen


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 30, 40])
def test_no_gap_between_resident_blocks_is_much_wider_than_another(num_blocks: int) -> None:
    for count in range(1, num_blocks + 1):
        chosen = spread(num_blocks, count)
        assert len(set(chosen)) == count and set(chosen) <= set(range(num_blocks))
        gaps = {after - before for before, after in pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def toy_layers() -> list[LayerSpec]:
    """Three blocks of 1000 elements in 2000 bytes, 256 of which make keys, and 50 elements outside."""
    return [
        LayerSpec(network="dit", name="head.weight", num_parameters=50, dtype="F32", is_matrix=False),
        *(
            LayerSpec(
                network="dit", name=f"blocks.{i}.{name}", num_parameters=n, dtype="BF16", is_matrix=True
            )
            for i in range(3)
            for name, n in (("ffn.0.weight", 872), ("cross_attn.k.weight", 128))
        ),
    ]


TOY = DiTSizes(dim=8, ffn_dim=16, num_layers=3, num_heads=2, in_dim=16, out_dim=16)


def test_sizes_are_added_up() -> None:
    (size,) = layers.sizes_of(toy_layers()).values()
    assert (size.num_parameters, size.num_bytes, size.rest_bytes) == (3050, 6200, 200)
    # 1744 and 256 bytes, each from a multiple of 256 on
    assert [(b.num_bytes, b.slot_bytes, b.key_bytes) for b in size.blocks] == [(2000, 2048, 256)] * 3


def test_the_lean_plan_by_hand() -> None:
    request = {"height": 16, "width": 32, "num_frames": 5, "text_tokens": 4, "device": "cpu", "batch": 3}
    slow = Rates(tflops=1e-6)  # few tokens: a real machine would wait for copies
    found = plan_memory(toy_layers(), dit=TOY, num_persistent_param_in_dit=0, rates=slow, **request)
    network, dit = found.networks["dit"], phase(found, "dit")
    assert (network.where, network.num_slots, network.host) == ("streamed", 2, "pageable")
    assert (network.device_bytes, network.streamed_bytes) == (200 + 2 * 2048, 3 * 2048)
    assert (network.pageable_bytes, network.pinned_bytes, network.mapped_bytes) == (3 * 2048, 0, 200)
    assert (dit.weight_bytes, dit.slot_bytes, dit.key_bytes, dit.workspace_bytes) == (200, 4096, 0, 0)
    tokens, batch = 2 * 1 * 2, 3  # two latent frames of 2 x 4 positions, in patches of 2 x 2
    stream = batch * tokens * 8 * 2
    norms = (
        4 * stream + 3 * 2 * stream
    )  # x, its norm, q, k; three pieces in float32, here of the whole stream
    latents = (6 + 2) * batch * (tokens * 4) * 16 * 4
    rotations, context, keys = tokens * 4 * 4, 2 * batch * 4 * 8 * 2, 2 * batch * 4 * 2 * 8 * 2
    assert dit.activation_bytes == norms + latents + rotations + context + keys
    assert dit.peak_bytes == found.peak_bytes == 200 + 4096 + dit.activation_bytes


def test_time_by_hand() -> None:
    found = plan_memory(
        toy_layers(), dit=TOY, height=16, width=32, num_frames=5, text_tokens=4, device="cpu",
        num_persistent_param_in_dit=0, rates=Rates(copy_gbs=1e-3, tflops=1e-6),
    )  # fmt: skip
    tokens, context, d, f = 4, 4, 8, 16
    flops = 2 * tokens * (6 * d * d + 2 * d * f) + 4 * context * d * d + 4 * tokens * d * (tokens + context)
    assert found.compute_s == pytest.approx(2 * 3 * flops / 1e6)
    assert found.copy_s == pytest.approx(2 * 3 * 2048 / 1e6) and found.verdict == "compute-bound"


@pytest.mark.parametrize(
    ("size", "low", "high"), [(SMALL, 3.5e9, 4.5e9), (LARGE, 5.7e9, 6.5e9)], ids=["480P", "720P"]
)
def test_lean_14b_stays_within_what_the_card_must_have(size: dict[str, int], low: float, high: float) -> None:
    assert low <= plan(dit_14b(), num_persistent_param_in_dit=0, **size).peak_bytes <= high


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["480P", "720P"])
def test_flops_are_those_of_the_published_table(size: dict[str, int]) -> None:
    published = {480: 1678e12, 720: 6523e12}[size["height"]]  # TF per forward of T2V-14B
    found = plan(dit_14b(), num_persistent_param_in_dit=0, rates=Rates(tflops=1), **size)
    assert found.compute_s / 2 == pytest.approx(published / 1e12, rel=1e-3)
    assert found.copy_s * 25e9 / 2 == pytest.approx(28.11e9, rel=1e-3)


def test_decode_takes_what_others_have_measured() -> None:
    measured = 3.39e9  # kijai/ComfyUI-WanVideoWrapper 2042: bf16, 480 x 832, 81 frames
    decode = phase(plan(weights("vae", "wan2.1_vae"), dit=None), "vae")
    assert 0.9 * measured <= decode.peak_bytes <= 1.25 * measured


def test_a_streamed_text_encoder_is_small_and_leaves_its_table_on_the_host() -> None:
    found = plan(pipeline_14b(), vram_limit_gib=5)
    network = found.networks["text_encoder"]
    assert (network.where, network.resident_blocks) == ("streamed", ())
    assert network.mapped_bytes >= 256384 * 4096 * 2  # the table
    assert phase(found, "text").peak_bytes < 1.5e9


def test_constants_are_those_of_the_code() -> None:
    from diffsynth.models.wan.blocks import DiTBlock
    from diffsynth.models.wan.dit import FFN_CHUNK_TOKENS, WanDiT
    from diffsynth.models.wan.text_encoder import WanTextEncoder
    from diffsynth.ops.fused import CPU_PIECE_BYTES, GPU_PIECE_BYTES
    from diffsynth.pipelines.decoding import V1_TILE_SIZE
    from diffsynth.vram_management.flat import ALIGNMENT

    assert activations.PIECE_BYTES == {"cpu": CPU_PIECE_BYTES, "cuda": GPU_PIECE_BYTES}
    assert (activations.FFN_CHUNK_TOKENS, activations.TILE) == (FFN_CHUNK_TOKENS, V1_TILE_SIZE)
    assert layers.ALIGNMENT == ALIGNMENT
    assert WanTextEncoder.host_tables == layers.HOST_TABLES
    assert all(layers.KEY_LAYER.match(name) for name in DiTBlock.key_layers)
    assert layers.FP8_EDGE_BLOCKS["dit"] == WanDiT.fp8_policy.num_edge_blocks
    assert WanTextEncoder.fp8_policy.num_edge_blocks == layers.FP8_EDGE_BLOCKS.get("text_encoder", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_a_header_tells_what_the_module_becomes(dtype: torch.dtype) -> None:
    from diffsynth.ops.fp8_policy import put_fp8_layers
    from tests.unit.checkpoints.weights import toy_dit

    module = toy_dit(num_layers=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    stored = "F8_E4M3" if dtype == torch.float8_e4m3fn else "BF16"
    told = layers_of_shapes("dit", shapes, dict.fromkeys(shapes, "F32"), stored_dtype=stored)
    module.to(torch.bfloat16)
    if dtype == torch.float8_e4m3fn:
        assert put_fp8_layers(module)
    facts = {(t.name, t.num_parameters, t.dtype, t.is_matrix) for t in told}
    assert facts == {
        (t.name, t.num_parameters, t.dtype, t.is_matrix) for t in layers_of_module("dit", module)
    }
    assert all(not t.is_mapped for t in told), "what was converted cannot stay in the file"


# the choices


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
    assert two.networks["dit_low_noise"].resident_blocks == one.networks["dit"].resident_blocks
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
    found = plan(pipeline_14b(), vram_limit_gib=8, **LARGE)
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


# the host


def test_pinned_memory_holds_what_travels() -> None:
    found = plan(pipeline_14b(), vram_limit_gib=8)
    pinned = [n for n in found.networks.values() if n.host == "pinned"]
    assert {n.network for n in pinned} == {"dit", "text_encoder"}
    assert found.pinned_bytes == sum(n.streamed_bytes for n in pinned)


def test_without_room_to_pin_blocks_come_through_a_ring() -> None:
    found = plan(pipeline_14b(), vram_limit_gib=8, ram_limit_gib=30)
    assert found.networks["dit"].host == "pinned", "it travels most often"
    assert found.networks["text_encoder"].host == "ring"
    small = plan(pipeline_14b(), vram_limit_gib=8, ram_limit_gib=8)
    assert small.networks["dit"].host == "ring" and any("ring" in note for note in small.notes)
    assert small.pinned_bytes + small.pageable_bytes + 2e9 <= 8 * GIB
    assert small.copy_s == pytest.approx(5 * found.copy_s, rel=0.01), "at the ring's rate"


def test_ram_below_the_minimum_is_refused_with_the_minimum() -> None:
    with pytest.raises(MemoryBudgetError, match=r"ram_limit is 16 GiB.*at least .*dtype"):
        plan(pipeline_14b("F32"), vram_limit_gib=12, ram_limit_gib=16, compute_dtype="F32")
    with pytest.raises(MemoryBudgetError, match="ram_limit is 2 GiB") as refused:
        plan(pipeline_14b(), vram_limit_gib=8, ram_limit_gib=2)
    assert plan(pipeline_14b(), vram_limit_gib=8, ram_limit_gib=refused.value.minimum_gib)


# errors


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
@pytest.mark.parametrize("size", [SMALL, LARGE, PICTURE], ids=["480P", "720P", "picture"])
def test_the_minimum_that_an_error_names_is_one_that_holds(dtype: str, size: dict[str, int]) -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"vram_limit is 0.5 GiB.*at least .* GiB, for phase"
    ) as refused:
        plan(pipeline_14b(dtype), vram_limit_gib=0.5, **size)
    minimum = refused.value.minimum_gib
    found = plan(pipeline_14b(dtype), vram_limit_gib=minimum, **size)
    assert found.peak_bytes + found.reserve_bytes <= minimum * GIB
    with pytest.raises(MemoryBudgetError):
        plan(pipeline_14b(dtype), vram_limit_gib=minimum - 0.02, **size)


def test_a_limit_and_a_number_of_parameters_must_both_hold() -> None:
    with pytest.raises(MemoryBudgetError, match="lower num_persistent_param_in_dit") as refused:
        plan(dit_14b(), vram_limit_gib=12, num_persistent_param_in_dit=10_000_000_000)
    found = plan(
        dit_14b(), vram_limit_gib=refused.value.minimum_gib, num_persistent_param_in_dit=10_000_000_000
    )
    assert len(found.networks["dit"].resident_blocks) == 27


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_persistent_param_in_dit": 10**11}, "has 14288491584 parameters"),
        ({"num_persistent_param_in_dit": -1}, "is -1"),
        ({"height": 0}, "height is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"text_tokens": -1}, "text_tokens is -1"),
        ({"compute_dtype": "F8_E4M3"}, "compute_dtype"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dit": None}, "DiTSizes.from_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_cannot_work_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan(dit_14b(), **wrong)


def test_a_number_of_parameters_without_a_dit_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="there is no DiT"):
        plan(weights("vae", "wan2.1_vae"), num_persistent_param_in_dit=0, dit=None)


def test_a_rate_of_zero_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="tflops is 0"):
        Rates(tflops=0)


def test_a_missing_block_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="expected 0 to 1"):
        layers.sizes_of(layer for layer in toy_layers() if not layer.name.startswith("blocks.1."))

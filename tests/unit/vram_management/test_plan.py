"""The plan's arithmetic by hand, its limits on the host, its errors; its constants are those of the code."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from diffsynth.errors import ArgumentError, MemoryBudgetError
from diffsynth.vram_management import activations, layers
from diffsynth.vram_management.plan import Rates, layers_of_module, layers_of_shapes, plan_memory, spread
from tests.unit.vram_management.plans import (
    GIB,
    LARGE,
    PICTURE,
    SMALL,
    TOY,
    dit_14b,
    phase,
    pipeline_14b,
    plan,
    toy_layers,
    weights,
)

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
    from diffsynth.pipelines.rungs import V1_TILE_SIZE
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


def test_more_parameters_than_there_are_means_all(caplog: pytest.LogCaptureFixture) -> None:
    found = plan(dit_14b(), num_persistent_param_in_dit=70_000_000_000)
    assert found == plan(dit_14b(), num_persistent_param_in_dit=14_288_491_584)
    assert len(caplog.messages) == 1 and "14288491584 parameters: all stay" in caplog.messages[0]


def test_a_number_of_parameters_without_a_dit_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="there is no DiT"):
        plan(weights("vae", "wan2.1_vae"), num_persistent_param_in_dit=0, dit=None)


def test_a_rate_of_zero_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="tflops is 0"):
        Rates(tflops=0)


def test_a_missing_block_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="expected 0 to 1"):
        layers.sizes_of(layer for layer in toy_layers() if not layer.name.startswith("blocks.1."))

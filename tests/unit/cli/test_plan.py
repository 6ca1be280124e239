"""``diffsynth plan`` on files that are all header: what it prints, and what it says when nothing fits."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.unit.checkpoints.weights import manifests, write_sparse, write_sparse_pth
from tests.unit.cli.running import Shell


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sparse(tmp_path / "dit.safetensors", manifests()["wan2.1_t2v_14b"])
    write_sparse(tmp_path / "vae.safetensors", manifests()["wan2.1_vae"], "F32", 4)
    write_sparse_pth(tmp_path / "t5.pth", manifests()["umt5_xxl_enc_bf16"])
    return tmp_path


def test_the_table_tells_all_that_a_user_needs(shell: Shell, folder: Path) -> None:
    ran = shell("plan", folder, "--vram", 12, "--ram", 48)
    assert ran.status == 0 and ran.err == ""
    for part in (
        "480 x 832, 81 frames, bf16", "text ", "dit ", "vae ", "of 40 blocks, 2 slots", "GiB pinned",
        "compute-bound", "s of copies at 25 GB/s", "s of compute at 150 TFLOP/s",
        "enable_vram_management(vram_limit=12, ram_limit=48)", "torch.bfloat16", str(folder),
    ):  # fmt: skip
        assert part in ran.out, part


def test_json_has_the_plan_and_the_request(shell: Shell, folder: Path) -> None:
    arguments = (
        "--vram",
        24,
        "--dtype",
        "fp8",
        "--num-persistent",
        5_000_000_000,
        "--no-cfg",
        "--tflops",
        650,
    )
    told = json.loads(shell("plan", folder, "--json", *arguments).out)
    assert set(told) == {
        "networks", "phases", "interleaves_branches", "keeps_keys", "ffn_chunk_tokens", "tiled_vae", "copy_s",
        "compute_s", "verdict", "reserve_bytes", "notes", "peak_bytes", "pinned_bytes", "pageable_bytes",
        "mapped_bytes", "request", "passed_over", "tiled_encode", "locked_bytes",
    }  # fmt: skip
    assert [phase["name"] for phase in told["phases"]] == ["text", "dit", "vae"]
    assert max(phase["peak_bytes"] for phase in told["phases"]) == told["peak_bytes"]
    assert set(told["phases"][1]) >= {
        "weight_bytes", "slot_bytes", "activation_bytes", "key_bytes", "pinned_bytes", "pageable_bytes",
        "mapped_bytes",
    }  # fmt: skip
    dit = told["networks"]["dit"]
    assert len(dit["resident_blocks"]) == 13 and dit["where"] == "streamed"
    request = told["request"]
    assert (request["num_branches"], request["dtype"], request["rates"]["tflops"]) == (1, "fp8", 650)


def test_what_is_pinned_when_networks_come_again_is_told(shell: Shell, folder: Path) -> None:
    ran = shell("plan", folder, "--num-persistent", 0).out
    assert "GiB (dit, text_encoder, vae) are pinned as well when they come a second time" in ran
    networks = json.loads(shell("plan", folder, "--json").out)["networks"]
    # Without a limit every network comes for its phase.
    assert all(network["locked_bytes"] == network["weight_bytes"] for network in networks.values())
    assert "pinned as well" not in shell("plan", folder, "--num-persistent", 0, "--ram", 64).out
    assert "pinned as well" not in shell("plan", folder, "--vram", 80).out  # all stay


def test_the_minimum_and_what_would_fit_are_said(shell: Shell, folder: Path) -> None:
    ran = shell("plan", folder, "--height", 720, "--width", 1280, "--vram", 5)
    assert ran.status == 1 and ran.out == "" and "Traceback" not in ran.err
    assert "at least 6.1" in ran.err and "phase 'dit'" in ran.err
    assert "This would fit: --height 480 --width 832; or" in ran.err
    minimum = ran.err.split("--vram ")[-1]
    assert shell("plan", folder, "--height", 720, "--width", 1280, "--vram", minimum.strip()).status == 0
    told = json.loads(shell("plan", folder, "--vram", 1, "--json").out)
    assert told["minimum_gib"] > 3 and told["fits"] == []


def test_two_experts_and_their_adapters_are_told_apart(shell: Shell, tmp_path: Path) -> None:
    for role in ("low", "high"):
        (tmp_path / f"{role}_noise_model").mkdir()
        file = tmp_path / f"{role}_noise_model" / "model.safetensors"
        write_sparse(file, manifests()["wan2.2_vace_fun_a14b"])
    told = json.loads(shell("plan", tmp_path, "--vram", 24, "--json").out)
    assert set(told["networks"]) == {"dit", "vace", "dit_low_noise", "vace_low_noise"}
    networks = MappingProxyType({phase["name"]: phase["networks"] for phase in told["phases"]})
    assert networks == {"dit": ["dit", "vace"], "dit_low_noise": ["dit_low_noise", "vace_low_noise"]}


def test_what_is_no_part_of_a_pipeline_is_named_and_passed_over(shell: Shell, folder: Path) -> None:
    write_sparse(folder / "longcat.safetensors", manifests()["longcat_video"])
    write_sparse(folder / "what.safetensors", {"a.weight": (2, 2)})
    ran = shell("plan", folder)
    assert ran.status == 0
    assert "Passed over" in ran.out and "longcat.safetensors" in ran.out and "match no known model" in ran.out
    alone = shell("plan", folder / "longcat.safetensors")
    assert alone.status == 1 and "not one of the Wan models" in alone.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tflops", 0], "tflops is 0"),
        (["--num-frames", 0], "--num-frames is 0; give 1 to 4093: 4 k + 1"),
        (["--height", -1], "--height is -1; give 1 to 16384: pixels, a multiple of 16"),
        (["--width", 0], "--width is 0"),
        (["--width", 10**9], "--width is 1000000000"),
        (["--num-frames", -5], "--num-frames is -5"),
        (["--vram", "nan"], "--vram is nan; give GiB above 0"),
        (["--vram", -1], "--vram is -1"),
        (["--ram", "inf"], "--ram is inf"),
        (["--num-persistent", -1], "--num-persistent is -1"),
        (["--copy-gbs", "nan"], "copy_gbs is nan"),
        (["--ring-gbs", "inf"], "ring_gbs is inf"),
        (["--vram", 12, "--ram", 1], "ram_limit is 1 GiB"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_values_that_cannot_work_end_with_one_message(
    shell: Shell, folder: Path, arguments: list[object], words: str
) -> None:
    ran = shell("plan", folder, *arguments)
    assert ran.status == 1 and words in ran.err and "Traceback" not in ran.err


def test_a_plan_is_of_the_size_that_a_generation_makes(shell: Shell, folder: Path) -> None:
    ran = shell("plan", folder, "--height", 470, "--width", 832, "--num-frames", 80)
    assert ran.status == 0 and "Plan for 480 x 832, 81 frames" in ran.out
    assert (
        "warning: --height 470 is planned as 480" in ran.err and "--num-frames 80 is planned as 81" in ran.err
    )


def test_two_networks_of_one_kind_are_refused_by_name(shell: Shell, folder: Path) -> None:
    write_sparse(folder / "second_vae.safetensors", manifests()["wan2.1_vae"])
    ran = shell("plan", folder)
    assert ran.status == 1 and "vae.safetensors" in ran.err and "Give one of them" in ran.err


USUAL = [
    pytest.param(["wan2.1_t2v_14b"], "480 x 832, 81 frames", id="2.1"),
    pytest.param(["wan2.2_ti2v_5b"], "704 x 1280, 121 frames", id="5B"),
    pytest.param(["wan2.2_fun_5b_control"], "704 x 1280, 121 frames", id="Fun-5B"),
    pytest.param(["wan2.2_t2v_a14b", "wan2.2_t2v_a14b"], "720 x 1280, 81 frames", id="A14B"),
]


@pytest.mark.parametrize(("models", "sizes"), USUAL)
def test_sizes_that_nobody_names_are_the_models(
    shell: Shell, tmp_path: Path, models: list[str], sizes: str
) -> None:
    for number, model in enumerate(models):
        write_sparse(tmp_path / f"{('high', 'low')[number]}_noise.safetensors", manifests()[model])
    ran = shell("plan", tmp_path)
    assert ran.status == 0 and f"Plan for {sizes}, bf16" in ran.out
    small = shell("plan", tmp_path, "--height", 64, "--num-frames", 17)
    assert f"Plan for 64 x {sizes.split()[2].rstrip(',')}, 17 frames" in small.out

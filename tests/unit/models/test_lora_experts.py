"""LoRAs of two experts: which file goes where, pairs, and strengths and schedules for each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError, CheckpointNotFoundError, LoRAError
from diffsynth.models.lora_experts import common_name, pair_of, twin_of
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.toys import TOY_DIT, write_toy_dit
from tests.unit.lora.files import comfy_file

D, H = TOY_DIT.dim, TOY_DIT.ffn_dim
SIZES = {"self_attn.q": (D, D), "ffn.0": (H, D)}
LAYERS = {f"blocks.{i}.{name}": size for i in range(2) for name, size in SIZES.items()}
NAME = "blocks.0.ffn.0.weight"
CALL = {"prompt_embeds": torch.ones(1, 4, 32), "cfg_scale": 1.0, "seed": 0, "output_type": "latent"}
SIGMAS = [1.0, 0.9, 0.6, 0.3]  # two steps of each expert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    torch.manual_seed(0)
    pairs = ("style_high_noise", "style_low_noise", "x_HIGH_fp16", "x_LOW_fp16")
    for name in ("plain", "lone_high_noise", *pairs):
        comfy_file(folder / f"{name}.safetensors", LAYERS)
    for seed, role in enumerate(("high", "low")):
        write_toy_dit(folder / f"{role}_noise_model" / "dit.safetensors", seed)
        write_toy_dit(folder / "unnamed" / f"{'ab'[seed]}.safetensors", seed)
    return folder


@pytest.fixture
def pipe(folder: Path) -> WanVideoPipeline:
    files = [folder / f"{role}_noise_model" / "dit.safetensors" for role in ("low", "high")]
    return WanVideoPipeline.from_model_manager(ModelManager(torch.float32, "cpu").load_models(files))


def weights(pipe: WanVideoPipeline) -> tuple[Tensor, Tensor]:
    found = []
    for network in (pipe.dit, pipe.dit2):
        assert isinstance(network, nn.Module)
        found.append(network.state_dict()[NAME].clone())
    return found[0], found[1]


def changed(pipe: WanVideoPipeline, load: Callable[[], object]) -> tuple[bool, bool]:
    before = weights(pipe)
    load()
    after = weights(pipe)
    pipe.unload_lora()
    assert all(torch.equal(a, b) for a, b in zip(weights(pipe), before, strict=True))
    return not torch.equal(before[0], after[0]), not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("file", "expert", "where"),
    [
        ("plain", None, (True, True)),
        ("plain", "both", (True, True)),
        ("plain", "high", (True, False)),
        ("plain", "low", (False, True)),
        ("style_high_noise", None, (True, False)),
        ("style_high_noise", "low", (False, True)),
        ("style_low_noise", None, (False, True)),
        ("style_low_noise", "both", (True, True)),
        ("x_HIGH_fp16", None, (True, False)),
        ("x_HIGH_fp16", "both", (True, True)),
        ("style", None, (True, True)),
        ("x_fp16", "both", (True, True)),
    ],
)
def test_a_file_goes_where_its_name_or_the_caller_says(
    file: str, expert: str | None, where: tuple[bool, bool], pipe: WanVideoPipeline, folder: Path
) -> None:
    path = folder / f"{file}.safetensors"
    assert changed(pipe, lambda: pipe.load_lora(path, expert=expert)) == where  # type: ignore[arg-type]
    pipe.swap_experts()
    load = lambda: pipe.load_lora(path, expert=expert)  # type: ignore[arg-type]  # noqa: E731
    assert changed(pipe, load) == where, "after a swap it is the other network that has the role"


def test_roles_told_by_the_caller_hold_for_loras(folder: Path) -> None:
    a, b = (folder / "unnamed" / f"{name}.safetensors" for name in "ab")
    manager = ModelManager(torch.float32, "cpu").load_models([a, b])
    pipe = WanVideoPipeline.from_model_manager(manager, dit=[b, a])
    file = folder / "style_low_noise.safetensors"
    assert changed(pipe, lambda: pipe.load_lora(file)) == (False, True)
    assert pipe.dit2 is manager.model[0]


def test_a_pair_has_a_name_for_both_and_one_for_each(pipe: WanVideoPipeline, folder: Path) -> None:
    reports = pipe.load_lora(folder / "style.safetensors", {"high": 0.5, "low": 1.0}, name="s")
    assert [(report.name, report.weight, report.lora.role) for report in reports] == [
        ("s_high_noise", 0.5, "high"), ("s_low_noise", 1.0, "low"),
    ]  # fmt: skip
    half = weights(pipe)
    pipe.set_lora("s", {"high": 1.0})
    whole = weights(pipe)
    assert not torch.equal(half[0], whole[0]) and torch.equal(half[1], whole[1])
    pipe.set_lora("s_low_noise", 0.0)
    assert torch.equal(weights(pipe)[0], whole[0]) and not torch.equal(weights(pipe)[1], whole[1])
    pipe.set_lora("s", 1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(pipe), whole, strict=True))
    pipe.unload_lora("s")
    assert pipe.parts.loras.names == []


def test_each_expert_follows_a_schedule_of_its_own_steps(pipe: WanVideoPipeline, folder: Path) -> None:
    pipe.load_lora(folder / "style.safetensors", mode="attach")

    def made(**schedule: object) -> Tensor:
        pipe.set_lora("style", schedule)  # type: ignore[arg-type]
        video = pipe(**CALL, sigmas=SIGMAS)
        assert isinstance(video, Tensor)
        return video

    expected = made(high=[1.0, 0.5, 9.0, 9.0], low=[9.0, 9.0, 0.25, 0.75])
    assert torch.equal(made(high=[1.0, 0.5], low=[0.25, 0.75]), expected)
    assert not torch.equal(made(high=[1.0, 0.5], low=[0.75, 0.25]), expected)
    with pytest.raises(ArgumentError, match="one per step, or one for each of the 2 steps of the low-noise"):
        made(high=[1.0, 0.5], low=[1.0, 1.0, 1.0])


def test_a_twin_that_is_not_loaded_is_told(
    pipe: WanVideoPipeline, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "diffsynth"):
        pipe.load_lora(folder / "style_high_noise.safetensors")
    assert "style_low_noise.safetensors, beside it, is not loaded" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "diffsynth"):
        pipe.load_lora(folder / "style_low_noise.safetensors")
    assert "beside it" not in caplog.text


def test_wrong_calls_are_told(pipe: WanVideoPipeline, folder: Path) -> None:
    plain, high = folder / "plain.safetensors", folder / "style_high_noise.safetensors"
    for kind, words, call in (
        (ArgumentError, "expert is 'middle'",
         lambda: pipe.load_lora(plain, expert="middle")),  # type: ignore[arg-type]
        (ArgumentError, "say the same", lambda: pipe.load_lora(plain, network="low", expert="low")),
        (LoRAError, r"lone_low_noise\.safetensors is not there",
         lambda: pipe.load_lora(folder / "lone_high_noise.safetensors", expert="both")),
        (ArgumentError, r"plain\.safetensors is for no one expert",
         lambda: pipe.load_lora(plain, {"high": 1.0})),
        (CheckpointNotFoundError, "lone", lambda: pipe.load_lora(folder / "lone.safetensors")),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            call()
    pipe.load_lora(high)
    with pytest.raises(ArgumentError, match=r"swap_experts.. with LoRAs loaded .style_high_noise"):
        pipe.swap_experts()
    pipe.load_lora(plain)
    with pytest.raises(ArgumentError, match="'plain' is no pair"):
        pipe.set_lora("plain", {"high": 0.5})


def test_names_of_pairs(tmp_path: Path) -> None:
    names = {
        "style_high_noise": "style", "wan_HIGH_fp16": "wan_fp16", "high_noise_style": "style",
        "style-low-noise": "style", "style": "style", "high_quality": "high_quality",
        "HighNoise": "HighNoise",
    }  # fmt: skip
    assert {name: common_name(name) for name in names} == names
    twins = {
        "a_HIGH.safetensors": "a_LOW.safetensors",
        "low_noise_model/x.safetensors": "high_noise_model/x.safetensors",
        "x-LowNoise.safetensors": "x-HighNoise.safetensors",
    }  # fmt: skip
    assert {name: twin_of(tmp_path / name) for name in twins} == {n: tmp_path / t for n, t in twins.items()}
    assert twin_of(tmp_path / "style.safetensors") is None and pair_of(tmp_path / "style.safetensors") is None

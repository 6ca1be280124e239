"""``diffsynth generate --lora``: each file acts with its strength, and wrong ones are told early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth import read_metadata
from diffsynth.pipelines.saved_latents import read_latents
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.toys import TOY_DIT
from tests.unit.cli.running import Ran, Shell, latents_of
from tests.unit.lora.files import comfy_file

LAYERS = {
    "blocks.0.self_attn.q": (TOY_DIT.dim, TOY_DIT.dim),
    "blocks.1.ffn.0": (TOY_DIT.ffn_dim, TOY_DIT.dim),
}


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return comfy_file(tmp_path / "loras" / "style.safetensors", LAYERS)


@pytest.fixture
def motion(tmp_path: Path) -> Path:
    """A colon in the name of a file is no strength."""
    return comfy_file(tmp_path / "loras" / "motion:2.safetensors", LAYERS)


def ran(shell: Shell, folder: Path, out: Path, loras: Sequence[object]) -> Ran:
    where = ("--model", folder, "--device", "cpu", "--dtype", "float32", "--seed", 0, "--keep-latents")
    given = [word for lora in loras for word in ("--lora", lora)]
    return shell("generate", "a red circle", *where, "--out", out, *given)


def expected(folder: Path, loras: Sequence[tuple[Path, float]]) -> Tensor:
    pipe = WanVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")
    for path, strength in loras:
        pipe.load_lora(path, strength)
    made = pipe("a red circle", seed=0, output_type="latent")
    assert isinstance(made, Tensor)
    return made


def test_each_lora_acts_with_its_strength(
    shell: Shell, toy_folder: Path, tmp_path: Path, style: Path, motion: Path
) -> None:
    done = ran(shell, toy_folder, tmp_path / "video.mp4", [f"{style}:0.5", motion])
    assert done.status == 0, done.err
    assert "LoRA 'style'" in done.err and "strength 0.5" in done.err
    made = read_latents(latents_of(tmp_path / "video.mp4")).latents
    assert torch.equal(made, expected(toy_folder, [(style, 0.5), (motion, 1.0)]))
    assert not torch.equal(made, expected(toy_folder, [(style, 1.0), (motion, 1.0)]))
    assert not torch.equal(made, expected(toy_folder, [(style, 0.5)]))
    settings = read_metadata(tmp_path / "video.mp4")
    assert settings["loras"] == {"style.safetensors": 0.5, "motion:2.safetensors": 1.0}


@pytest.mark.parametrize("given", ["absent.safetensors", "absent.safetensors:0.8", ":0.8"])
def test_a_lora_that_is_not_there_is_known_before_a_model_is_loaded(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded before the call was found good")

    monkeypatch.setattr("diffsynth.models.model_manager.ModelManager.load_models", never)
    done = ran(shell, tmp_path, tmp_path / "video.mp4", [given])
    assert done.status == 1 and f"--lora {given}: " in done.err and "FILE:STRENGTH" in done.err


def test_a_lora_that_does_not_fit_makes_no_video(shell: Shell, toy_folder: Path, tmp_path: Path) -> None:
    other = comfy_file(tmp_path / "other.safetensors", {"blocks.0.self_attn.q": (64, 64)})
    done = ran(shell, toy_folder, tmp_path / "video.mp4", [other])
    assert done.status == 1 and "another size" in done.err and not (tmp_path / "video.mp4").exists()

"""What would stop a run after hours of encoding is told before the first clip is encoded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffsynth.errors import DiffSynthError
from diffsynth.models.toy import toy_files
from diffsynth.tiny import tiny_folder
from diffsynth.training import cache, v1_flags
from diffsynth.training.checks import check_run
from diffsynth.training.config import TrainConfig
from diffsynth.training.run import train
from tests.unit.training.clips_of_noise import write_picture
from tests.unit.training.toy_runs import config_of

CPU = torch.device("cpu")
TINY = str(tiny_folder() / "diffusion_pytorch_model.safetensors")  # has blocks enough for fp8
PROMPT = {"every": 5, "prompts": ["a ball"]}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dataset of which nothing is encoded; that a clip would be is an error of its own."""
    folder = tmp_path_factory.mktemp("toy")
    write_picture(folder / "data" / "a.png")
    (folder / "data" / "a.txt").write_text("a ball")
    dit, text_encoder, vae = toy_files("t2v")
    (folder / "empty.ckpt").touch()
    (folder / "broken.png").write_bytes(b"\x89PNG")
    model = {"dit": [dit], "text_encoder": text_encoder, "vae": vae, "dtype": "float32", "device": "cpu"}
    return {
        "model": model, "data": [{"path": str(folder / "data"), "sizes": [[32, 48]], "num_frames": [1]}],
        "tune": {"rank": 4}, "run": {"workers": 0}, "folder": folder,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(*_: object) -> None:
        raise AssertionError("a clip was encoded")

    monkeypatch.setattr(cache, "encode_all", encoded)


def made(settings: Mapping[str, Any], output: Path, **sections: Any) -> TrainConfig:
    run = {"task": "both", **sections.pop("run", {})}
    plain = {name: value for name, value in settings.items() if name != "folder"}
    return config_of(plain, output, run=run, **sections)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer-name": ({"optimizer": {"name": "lion"}}, "optimizer.name is 'lion'"),
    "optimizer-class": ({"optimizer": {"name": "torch.optim.AdmW"}}, "Did you mean 'Adam"),
    "optimizer-package": ({"optimizer": {"name": "adamw8bit"}}, "pip install bitsandbytes"),
    "optimizer-option": ({"optimizer": {"options": {"weight_decy": 0.1}}}, "Did you mean 'weight_decay'"),
    "optimizer-value": ({"optimizer": {"options": {"betas": [0.9]}}}, "adamw.*betas"),
    "optimizer-text": ({"optimizer": {"options": {"eps": "tiny"}}}, "eps"),
    "optimizer-that-wants-more": ({"optimizer": {"name": "torch.optim.LBFGS"}}, "its first step fails"),
    "logger-name": ({"run": {"loggers": ["mlflow"]}}, "run.loggers names 'mlflow'"),
    "logger-package": ({"run": {"loggers": ["wandb"]}}, "pip install wandb"),
    "targets": ({"tune": {"targets": ["qq"]}}, "qq"),
    "targets-pattern": ({"tune": {"targets": ["re:("]}}, r"re:\("),
    "networks": ({"tune": {"networks": ["vace"]}}, "There is no 'vace' to train"),
    "parts": ({"tune": {"kind": "parts", "parts": ["re:nothing"]}}, "No tensor's name matches 'nothing'"),
    "fp8": ({"tune": {"kind": "full"}, "model": {"dtype": "fp8", "dit": [TINY]}}, "fp8, which cannot train"),
    "format": ({"tune": {"kind": "dora"}, "run": {"export_format": "diffusers"}}, "diffusers"),
    "resume": ({"run": {"resume": "gone.ckpt"}}, "run.resume is gone.ckpt"),
    "resume-damaged": ({"run": {"resume": "empty.ckpt"}}, "empty.ckpt cannot be read"),
    "start": ({"run": {"start_from": "gone.safetensors"}}, "gone.safetensors"),
    "prompts-vae": ({"samples": PROMPT, "model": {"vae": None}}, "samples.prompts needs"),
    "prompts-size": ({"samples": {**PROMPT, "height": -16}}, "height is -16"),
    "prompts-steps": ({"samples": {**PROMPT, "num_inference_steps": 0}}, "num_inference_steps is 0"),
    "prompts-picture": ({"samples": {**PROMPT, "input_images": ["gone.png"]}}, "Sample video 1 .*gone.png"),
    "prompts-damaged": ({"samples": {**PROMPT, "input_images": ["broken.png"]}}, "broken.png"),
    "prompts-unread": ({"samples": {**PROMPT, "input_images": ["data/a.png"]}}, "image"),
    "holdout": ({"samples": {"every": 5, "holdout": 1}}, "samples.holdout is 1"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "task"), [*((name, "data_process") for name in WRONG), ("optimizer-name", "both")]
)
def test_what_would_stop_the_run_is_told_before_a_clip_is_encoded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    task: str,
) -> None:  # fmt: skip
    sections, says = WRONG[name]
    monkeypatch.chdir(settings["folder"])
    changed = {**sections, "run": {**sections.get("run", {}), "task": task}}
    with pytest.raises(DiffSynthError, match=f"(?s){says}"):
        train(made(settings, tmp_path, **changed))


def test_a_folder_named_wandb_is_no_package(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # as wandb leaves it, where one starts from
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DiffSynthError, match="pip install wandb"):
        check_run(made(settings, tmp_path, run={"loggers": ["wandb"]}), CPU)
    whole = ModuleType("wandb")
    whole.init = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", whole)
    check_run(made(settings, tmp_path, run={"loggers": ["wandb"]}), CPU)


def test_a_picture_that_the_model_needs_is_asked_for(settings: dict[str, Any], tmp_path: Path) -> None:
    dit, text_encoder, vae, image_encoder = toy_files("i2v")
    model = {"dit": [dit], "text_encoder": text_encoder, "vae": vae, "image_encoder": image_encoder}
    with pytest.raises(DiffSynthError, match="input_image"):
        check_run(made(settings, tmp_path, model=model, samples=PROMPT), CPU)
    picture = {**PROMPT, "input_images": [str(settings["folder"] / "data" / "a.png")]}
    check_run(made(settings, tmp_path, model=model, samples=picture), CPU)
    with pytest.raises(DiffSynthError, match=r"CLIP|image encoder"):
        check_run(made(settings, tmp_path, model={**model, "image_encoder": None}, samples=picture), CPU)


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"tune": {"kind": "dora"}, "model": {"dtype": "fp8", "dit": [TINY]}}, id="dora-fp8"),
        pytest.param({"tune": {"kind": "lokr"}, "model": {"dtype": "fp8", "dit": [TINY]}}, id="lokr-fp8"),
        pytest.param({"tune": {"kind": "full"}}, id="full"),
        pytest.param({"tune": {"kind": "full", "fresh": True}}, id="fresh"),
        pytest.param({"tune": {"kind": "full", "rounding": "stochastic"}, "model": {"dtype": "bfloat16"}},
                     id="stochastic"),
        pytest.param({"optimizer": {"name": "torch.optim.Adafactor"}}, id="adafactor"),
        pytest.param({"samples": {**PROMPT, "height": 32, "width": 48}}, id="prompts"),
    ],
)  # fmt: skip
def test_what_can_be_trained_passes(
    settings: dict[str, Any], tmp_path: Path, sections: dict[str, Any]
) -> None:
    check_run(made(settings, tmp_path, **sections), CPU)


def test_prompts_that_are_never_made_are_told(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_run(made(settings, tmp_path, samples={**PROMPT, "every": 0}), CPU)
    assert "samples.every is 0" in caplog.text


def test_v1s_data_process_checks_what_its_flags_say(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = settings["model"]
    words = ["--dataset_path", settings["data"][0]["path"], "--num_frames", "1", "--height", "32"]
    words += ["--width", "48", "--dit_path", model["dit"][0]]
    (tmp_path / "locked").touch()
    encoding = ["--vae_path", model["vae"], "--text_encoder_path", model["text_encoder"]]
    with pytest.raises(DiffSynthError, match="locked"):
        v1_flags.run(["--task", "data_process", *words, *encoding, "--output_path", "locked"])
    with pytest.raises(DiffSynthError, match="qq"):
        v1_flags.run(["--task", "train", *words, "--lora_target_modules", "qq"])

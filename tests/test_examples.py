"""Examples are what a user would type: short, parsed, and run with toy weights in place of the real ones."""

from __future__ import annotations

import ast
import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffsynth
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder

FOLDER = Path(__file__).parents[1] / "examples" / "wanvideo"
EXAMPLES = sorted(FOLDER.glob("*.py"))
WITH_TOYS = [file for file in EXAMPLES if "--tiny" in file.read_text(encoding="utf-8")]
WITH_REAL_MODELS = [file for file in EXAMPLES if file.name.startswith("wan_") and file not in WITH_TOYS]


def test_the_usual_ways_to_use_a_model_have_an_example() -> None:
    assert {file.stem for file in EXAMPLES} >= {
        "tiny_text_to_video",
        "wan_1.3b_text_to_video",
        "wan_1.3b_video_to_video",
        "wan_14b_text_to_video",
        "wan_14b_image_to_video",
        "wan_14B_flf2v",
        "wan_fun_InP",
        "wan_fun_control",
        "wan_fun_reference_control",
        "wan_fun_control_camera",
        "wan_1.3b_motion_controller",
        "wan_1.3b_vace",
        "wan2.2_ti2v_5b",
    }


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_is_short_and_uses_public_names(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 40, f"{file.name} has grown past 40 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "diffsynth":
            assert {alias.name for alias in node.names} <= set(diffsynth.__all__)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe":
            asked = {keyword.arg for keyword in node.keywords}
            assert asked <= set(inspect.signature(WanVideoPipeline.__call__).parameters)


@pytest.mark.parametrize("file", WITH_REAL_MODELS, ids=lambda file: file.stem)
def test_example_runs_with_toy_weights(
    file: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, call, make = (
        ModelManager.load_models,
        WanVideoPipeline.__call__,
        WanVideoPipeline.from_model_manager,
    )
    asked: list[Any] = []

    def toys(self: ModelManager, paths: list[Any], *_: object) -> ModelManager:
        asked.extend(paths)
        return load(self, toy_folder)

    def on_the_cpu(manager: ModelManager, torch_dtype: torch.dtype, device: str) -> WanVideoPipeline:
        assert (torch_dtype, device) == (torch.bfloat16, "cuda")
        return make(manager, torch_dtype=torch_dtype, device="cpu")

    def small(self: WanVideoPipeline, **given: Any) -> Any:
        return call(self, **{**given, "num_inference_steps": 1})

    monkeypatch.setattr(ModelManager, "load_models", toys)
    monkeypatch.setattr(WanVideoPipeline, "from_model_manager", on_the_cpu)
    monkeypatch.setattr(WanVideoPipeline, "__call__", small)
    monkeypatch.chdir(tmp_path)
    diffsynth.save_video([Image.new("RGB", (832, 480))] * 5, "video.mp4")
    runpy.run_path(str(file), run_name="__main__")
    assert len(asked) == 3 and all("models/Wan-AI" in str(path) for path in asked)
    made = "edited.mp4" if "video_to_video" in file.stem else "video.mp4"
    assert len(diffsynth.VideoData(tmp_path / made)) == 5


@pytest.mark.parametrize("file", WITH_TOYS, ids=lambda file: file.stem)
def test_example_runs_with_tiny(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [file.name, "--tiny"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file), run_name="__main__")
    made = list(tmp_path.glob("*.mp4"))
    assert made and all(len(diffsynth.VideoData(video)) == 5 for video in made)


@pytest.mark.skipif(
    not (tiny_folder() / "diffusion_pytorch_model.safetensors").is_file(),
    reason="the tiny Wan's weights are not in this tree",
)
def test_the_tiny_example_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / "tiny_text_to_video.py"), run_name="__main__")
    assert len(diffsynth.VideoData("tiny.mp4")) > 1
    assert diffsynth.read_metadata("tiny.mp4")["prompt"] == "a red circle moves right"

"""docs/vace.md tells the truth: its code runs as written, its pictures are what the recipes make."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffsynth
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "vace.md").read_text(encoding="utf-8")


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, call = ModelManager.load_models, WanVideoPipeline.__call__
    make = WanVideoPipeline.from_model_manager
    asked: list[set[str]] = []

    def small(self: WanVideoPipeline, *words: Any, **given: Any) -> Any:
        asked.append({name for name in given if name.startswith("vace")})
        if "vace_video" in given:
            assert len(given["vace_video"]) == 81
        sizes = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 1, "fit": "trim"}
        if "vace_video" not in given:
            del sizes["fit"]
        return call(self, *words, **{**given, **sizes})

    monkeypatch.setattr(ModelManager, "load_models", lambda self, paths: load(self, toy_files("vace")))
    monkeypatch.setattr(WanVideoPipeline, "__call__", small)
    monkeypatch.setattr(
        WanVideoPipeline, "from_model_manager", lambda manager, device: make(manager, device="cpu")
    )
    monkeypatch.chdir(tmp_path)
    diffsynth.save_video([np.full((48, 64, 3), 90, np.uint8)] * 81, "clip.mp4")
    Image.new("RGBA", (40, 40)).save("cat.png")
    code = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE, re.S))
    exec(compile(code, "vace.md", "exec"), {})
    assert len(asked) == 11 and {"vace_reference_image"} in asked
    assert len(diffsynth.VideoData("expanded.mp4")) == 5


def test_pictures_are_those_of_the_recipes() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_vace.py"))["draw"]()
    assert {f"pictures/{name}" for name in drawn} == set(re.findall(r"!\[.*?\]\((.*?)\)", GUIDE))
    for name, picture in drawn.items():
        kept = Image.open(DOCS / "pictures" / name).convert("RGB")
        assert np.array_equal(np.asarray(kept), np.asarray(picture)), f"{name}: python docs/draw_vace.py"

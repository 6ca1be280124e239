"""The README's code runs as written, with toy weights in place of the real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import diffsynth
from diffsynth.cli.app import app
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"diffsynth ((?:generate|decode|plan|inspect|doctor)[^#\n`]*)",
    "\n".join(code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M) if not kind),
)


def test_both_commands_stand_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:24])
    assert first_screen.count("python3 -m venv .venv && ") == 2
    assert "diffsynth generate" in first_screen and "-m pytest" in first_screen


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_commands_parse(line: str) -> None:
    name, *words = shlex.split(line)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    if "--help" not in words:
        command.make_context(name, words)


def test_python_code_runs(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    load, call = ModelManager.load_models, WanVideoPipeline.__call__
    make = WanVideoPipeline.from_model_manager

    def small(self: WanVideoPipeline, *words: Any, **given: Any) -> Any:
        sizes = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1}
        return call(self, *words, **{**given, **sizes})

    monkeypatch.setattr(ModelManager, "load_models", lambda self, paths: load(self, toy_folder))
    monkeypatch.setattr(WanVideoPipeline, "__call__", small)
    monkeypatch.setattr(
        WanVideoPipeline, "from_model_manager", lambda manager, device: make(manager, device="cpu")
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert len(diffsynth.VideoData(tmp_path / "cat.mp4")) == 5


def test_files_that_the_readme_names_are_there() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), f"README.md links to {target}, which is not there"

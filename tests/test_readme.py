"""The README's code runs as written, with toy weights in place of the real ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import diffsynth
from diffsynth.cli.app import app
from diffsynth.cli.generate_task import with_task
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"diffsynth ((?:generate|refine|decode|plan|inspect|dataset|train|lora|preprocess|doctor)\b[^#\n`]*)",
    "\n".join(code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M) if not kind),
)


def test_both_commands_stand_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:24])
    assert first_screen.count("python3 -m venv .venv && ") == 2
    assert "diffsynth generate" in first_screen and "-m pytest" in first_screen


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_commands_parse(line: str) -> None:
    words, command = shlex.split(line), get_command(app)
    while commands := getattr(command, "commands", {}):
        command = commands[words.pop(0)]
    if "--help" in words:
        return
    given = command.make_context(command.name, [*words]).params
    if command.name == "train":  # takes any flag, and reads them by its settings
        from diffsynth.training.config import TrainConfig
        from diffsynth.training.config_files import load_config

        load_config(TrainConfig, str(ROOT / words[0]), words[1:])
    if command.name == "generate":
        values = {name: getattr(value, "value", value) for name, value in given.items()}
        with_task(values.pop("prompt") or values["prompt_text"], values)


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
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


def test_what_is_said_of_real_gpus_is_what_the_results_say() -> None:
    lines = [line for file in (ROOT / "benchmarks/results").glob("*.jsonl") for line in file.open()]
    has_rows = any(json.loads(line)["machine"].get("gpu") for line in lines)
    says_none = "No result of this version comes from a real GPU" in README
    assert says_none is not has_rows, "a row of a GPU came or went: tell it in README, Where it runs"

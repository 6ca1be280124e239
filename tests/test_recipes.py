"""The recipes load, name files as their models have them, and the tiny ones run; the page tells the truth."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import load_config
from diffsynth.training.config_table import rows
from diffsynth.training.run import train
from diffsynth.video import save_video

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "train" / "recipes").glob("*.yaml"))
LARGE = [file for file in RECIPES if not file.stem.startswith("tiny")]
# those that begin with the weights of the package
TINY = [file for file in RECIPES if "dit: [diffsynth/tiny/weights/" in file.read_text(encoding="utf-8")]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
# below models/Wan-AI: shards by pattern, experts as folders
FILE = re.compile(r"models/Wan-AI/(?P<model>Wan2\.[12]-[\w-]+(?:\.3B)?)/(?P<file>[\w.*-]+)")


def name_of(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_recipe_loads_and_is_told_of(file: Path) -> None:
    config = load_config(TrainConfig, file)
    assert config.run.task == "both" and config.model.text_encoder and config.model.vae
    assert config.run.output.startswith("output/")
    assert f"diffsynth train train/recipes/{file.name}" in file.read_text()
    assert f"`{file.name}`" in PAGE


@pytest.mark.parametrize("file", LARGE, ids=name_of)
def test_recipe_names_files_of_one_released_model(file: Path) -> None:
    model = load_config(TrainConfig, file).model
    paths = [*model.dit, *model.dit_low, model.text_encoder, model.vae, model.image_encoder]
    found = [FILE.fullmatch(path) for path in paths if path is not None]
    assert all(found), [path for path in paths if path is not None and not FILE.fullmatch(path)]
    assert len({match["model"] for match in found if match}) == 1
    [(name, vae)] = {(match["model"], match["file"]) for match in found if match and "VAE" in match["file"]}
    assert vae == ("Wan2.2_VAE.pth" if "5B" in name else "Wan2.1_VAE.pth")
    assert bool(model.dit_low) == ("A14B" in name and "_low_" not in file.stem) and bool(
        model.image_encoder
    ) == ("I2V-14B-" in name)


@pytest.mark.parametrize("file", TINY, ids=name_of)
def test_tiny_recipe_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipes name the weights of the checkout
    for number in range(3):
        frames = [np.full((64, 64, 3), 60 * number + frame, np.uint8) for frame in range(17)]
        save_video(frames, tmp_path / f"{number}.mp4", fps=8)
        (tmp_path / f"{number}.txt").write_text(f"a red circle {number}")
    flags = {
        "run.output": tmp_path / "out", "run.steps": 2, "run.batch_size": 1,
        "run.save_every": 0, "samples.holdout": 1, "samples.every": 0, "samples.prompts": "[]",
        "model.device": "cpu",
    }  # fmt: skip
    config = load_config(TrainConfig, file, [f"--{key}={value}" for key, value in flags.items()])
    data = [replace(one, path=str(tmp_path), num_frames=(min(17, one.num_frames[0]),)) for one in config.data]
    report = train(replace(config, data=tuple(data)))
    assert report.step == 2 and report.export is not None and report.export.is_file()


def test_figures_that_a_recipe_tells_are_predicted() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "training_tables.py"))
    large = {name: made["predicted"](made["DIT_14B"], **choice) for name, choice in made["CHOICES"]}
    text = (ROOT / "train" / "recipes" / "wan_14b_lora.yaml").read_text(encoding="utf-8")
    _, *rows_of_page = [(round(device), round(host)) for device, host in large.values()]
    told = [int(figure) for figure in re.findall(r"about (\d+) GB", text)]
    assert told == [device for device, _ in rows_of_page]
    assert f"and {rows_of_page[-1][1]} GB of pinned RAM" in text
    whole, _ = made["predicted"](made["DIT_1_3B"], whole=True)
    assert f"about {whole:.0f} GB" in (ROOT / "train" / "recipes" / "wan_1.3b_full.yaml").read_text()


def test_tables_of_the_page_are_those_of_the_code() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "training_tables.py"))
    assert made["with_tables"](PAGE) == PAGE, "run: python docs/training_tables.py"


def test_settings_that_the_page_names_are_there() -> None:
    keys = {row.key.replace(".0.", ".") for row in rows(TrainConfig)}
    sections = {key.partition(".")[0] for key in keys}
    text = PAGE.partition("## Settings")[0]
    named = re.findall(r"`(?:--)?([a-z_]+)\.([a-z_]+)(?:[:` ])", text)
    settings = {f"{section}.{name}" for section, name in named if section in sections}
    assert len(settings) > 15 and settings <= keys, settings - keys


def test_the_tutorial_generates_with_the_file_that_its_recipe_writes() -> None:
    tutorial = PAGE.partition("## A tutorial on a CPU")[2].partition("\n## ")[0]
    config = load_config(TrainConfig, ROOT / "train" / "recipes" / "tiny_lora.yaml")
    [num_clips] = re.findall(r"--clips (\d+)", tutorial)
    assert not config.samples.every  # else some are held out
    sizes = [one.own_batch_size or config.run.batch_size for one in config.data]
    epoch_steps = sum(
        ceil(int(num_clips) * one.repeats / size) for one, size in zip(config.data, sizes, strict=True)
    )
    name = f"epoch={(config.run.steps - 1) // epoch_steps}-step={config.run.steps}.safetensors"
    assert f"--lora {config.run.output}/lightning_logs/version_0/checkpoints/{name}" in tutorial


def test_files_that_the_page_names_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), f"training.md links to {target}, which is not there"
    for recipe in re.findall(r"train/recipes/([\w.]+\.yaml)", PAGE):
        assert (ROOT / "train" / "recipes" / recipe).is_file(), recipe

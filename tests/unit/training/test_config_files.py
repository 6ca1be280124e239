from __future__ import annotations

from pathlib import Path

import pytest

from diffsynth.errors import ArgumentError, UnknownArgumentError
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import load_config, save_config, to_yaml
from diffsynth.training.config_table import help_text, rows, table

TEXT = """
model: {dit: [dit.safetensors], device: cpu}
data:
  - {path: clips, sizes: [[32, 48], [48, 32]], fps: native}
optimizer: {learning_rate: 1e-3, options: {weight_decay: 0.1}}
run: {steps: 10, seed: 7}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_yaml_and_flags_make_one_config(file: Path) -> None:
    flags = [
        "--run.steps", "20", "--learning_rate=2e-4", "--data.0.fps", "12", "--data.1.path", "no",
        "--tune.targets", "q,k", "--run.deterministic", "--optimizer.options.momentum", "0.9",
        "--model.device", "none",
    ]  # fmt: skip
    config = load_config(TrainConfig, file, flags)
    assert (config.run.steps, config.run.seed, config.run.deterministic) == (20, 7, True)
    assert config.optimizer.learning_rate == 2e-4
    assert config.optimizer.options == {"weight_decay": 0.1, "momentum": 0.9}
    assert config.data[0].sizes == ((32, 48), (48, 32)) and config.data[0].fps == 12.0
    assert config.data[1].path == "no"  # a text stays a text, whatever YAML would read in it
    assert config.tune.targets == ("q", "k")
    assert config.model.device is None


def test_a_saved_config_is_read_as_it_was(file: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, file, ["--samples.prompts", '["a, b", "yes"]'])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(TrainConfig, tmp_path / "saved.yaml") == config
    assert config.samples.prompts == ("a, b", "yes")
    assert "learning_rate: 0.001" in to_yaml(config)


@pytest.mark.parametrize(
    ("flags", "error", "told"),
    [
        (["--run.stepz", "3"], UnknownArgumentError, "'run' has no argument 'stepz'. Did you mean 'steps'"),
        (["--lerning_rate", "3"], UnknownArgumentError, "Did you mean 'learning_rate'"),
        (["--run.steps", "many"], ArgumentError, "run.steps is 'many' .*a whole number"),
        (["--run.steps", "1.5"], ArgumentError, "run.steps is '1.5'"),
        (["--run.steps", "0"], ArgumentError, "steps is 0; give 1 or more"),
        (["--tune.kind", "lorra"], ArgumentError, "tune.kind is 'lorra'; give one of .*Did you mean 'lora'"),
        (["--seed", "1"], ArgumentError, "--seed may be .*--run.seed"),
        (["--data.5.path", "x"], ArgumentError, "the list has 1 entries"),
        (["--data.path", "x"], ArgumentError, "say which entry, such as --data.0.path"),
        (["steps", "3"], ArgumentError, "'steps' follows no --key"),
        (["--memory.stream"], ArgumentError, "memory.gradient_checkpointing to full"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_flag_is_told_with_its_place(
    file: Path, flags: list[str], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        load_config(TrainConfig, file, flags)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {dit: x.safetensors}\ndata: [{path: a}]", "model.dit is 'x.safetensors'; expected a list"),
        ("model: [1]", r"model is \[1\]; expected keys with values: dit"),
        ("- 1", "holds list; expected keys"),
        ("run: {steps: yes}", "run.steps is True"),
        ("data: [{path: a, sizes: [[1, 2, 3]]}]", "data.0.sizes.0 has 3 values"),
        ("data: [{fps: 3}]", "'data.0' lacks path"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ArgumentError, match=told):
        load_config(TrainConfig, tmp_path / "run.yaml")


def test_every_key_stands_in_table_and_help_with_what_it_is() -> None:
    keys = {row.key: row for row in rows(TrainConfig)}
    assert {"run.steps", "data.0.path", "optimizer.learning_rate", "cache.cache_dir"} <= keys.keys()
    assert [key for key, row in keys.items() if not row.help] == []
    assert keys["run.steps"].default == "1000" and keys["data.0.path"].default == "required"
    told, helped = table(TrainConfig), help_text(TrainConfig)
    assert all(f"`{key}`" in told and f"--{key} " in helped for key in keys)


def test_strict_is_one_wish_for_data_and_cache(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {dit: [x]}\ndata: [{path: a}, {path: b}]")
    config = load_config(TrainConfig, tmp_path / "run.yaml", ["--strict"])
    assert [one.strict for one in config.data] == [True, True] and config.cache.strict
    first = load_config(TrainConfig, None, ["--strict", "--model.dit", "x", "--data.0.path", "a"])
    assert first.data[0].strict and first.cache.strict
    alone = load_config(TrainConfig, tmp_path / "run.yaml", ["--data.1.strict", "true"])
    assert [one.strict for one in alone.data] == [False, True] and not alone.cache.strict


def test_the_home_folder_is_meant_by_a_tilde(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(TrainConfig, file, ["--run.output", "~/x"]).run.output == str(tmp_path / "x")

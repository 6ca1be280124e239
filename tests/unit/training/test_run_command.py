from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffsynth.cli.app import app
from diffsynth.errors import ArgumentError
from diffsynth.training.config import RunConfig, TrainConfig
from diffsynth.training.config_files import to_yaml
from diffsynth.training.dataset.config import DatasetConfig
from diffsynth.training.processes import Ranks
from tests.unit.training.toy_runs import config_of, toy_settings


def test_the_command_trains_by_its_file_and_flags(tmp_path: Path) -> None:
    config = config_of(toy_settings(tmp_path), tmp_path / "out")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--steps", "2", "--batch_size=1"])
    assert done.exit_code == 0, done.output
    assert "2 steps; " in done.output and "step=2.safetensors" in done.output


def test_help_lists_every_key_and_a_wrong_one_gets_the_nearest() -> None:
    told = CliRunner().invoke(app, ["train", "--help"])
    assert told.exit_code == 0
    assert "--run.steps integer [1000]" in told.output and "--data.0.path text [required]" in told.output
    wrong = CliRunner().invoke(app, ["train", "--run.stepz", "3"])
    assert wrong.exit_code == 1 and "Did you mean 'steps'?" in wrong.output


def test_machines_are_told_apart_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(data=(DatasetConfig(path="x"),), run=RunConfig(task="data_process", nodes=2))
    with pytest.raises(ArgumentError, match="torchrun --nnodes 2"):
        Ranks.of(config, torch.device("cpu"))
    told = {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert Ranks.of(config, torch.device("cpu")) == Ranks(devices=4, nodes=2, rank=5, is_external=True)

"""DeepSpeed: its settings, what is refused, and, where it is installed, that two processes equal one.

Lightning runs it on CUDA alone. The tests take its checks for that away and run it on the CPU, with gloo.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.strategies import deepspeed as lightning_deepspeed

from diffsynth.errors import ArgumentError, MissingPackageError
from diffsynth.training import run as training_run
from diffsynth.training import zero
from diffsynth.training.config import ZERO_STAGES
from diffsynth.training.run import train
from diffsynth.training.zero import deepspeed_config, deepspeed_strategy
from tests.unit.training.toy_runs import config_of, on_two_ranks, toy_settings, trained_tensors

STAGES = tuple(ZERO_STAGES)
# fp32: the sums over samples are taken in another order
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return toy_settings(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("forks, which CUDA does not survive")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(training_run, "require_gpu", lambda *_: None)
    monkeypatch.setattr(DeepSpeedStrategy, "setup_environment", DDPStrategy.setup_environment)
    monkeypatch.setattr(lightning_deepspeed, "_validate_device_index_selection", lambda devices: None)
    monkeypatch.setattr(lightning_deepspeed, "argparse", SimpleNamespace(Namespace=lambda **numbers: None))


@pytest.mark.parametrize("strategy", STAGES)
def test_the_settings_are_those_of_the_run(settings: dict[str, Any], tmp_path: Path, strategy: str) -> None:
    config = config_of(
        settings, tmp_path, run={"strategy": strategy, "batch_size": 3}, optimizer={"clip_norm": 0.5}
    )
    told = deepspeed_config(config)
    assert told["zero_optimization"]["stage"] == int(strategy[-1])
    assert told["gradient_clipping"] == 0.5
    assert told["train_micro_batch_size_per_gpu"] == 3


@pytest.mark.parametrize("strategy", STAGES)
@pytest.mark.usefixtures("on_the_cpu")
def test_deepspeed_takes_the_settings(settings: dict[str, Any], tmp_path: Path, strategy: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = config_of(settings, tmp_path, run={"strategy": strategy})
    assert isinstance(deepspeed_strategy(config), DeepSpeedStrategy)
    found = DeepSpeedConfig({**deepspeed_config(config), "gradient_accumulation_steps": 1})
    assert found.zero_optimization_stage == int(strategy[-1])
    assert found.gradient_clipping == config.optimizer.clip_norm


def test_without_its_package_it_is_told_what_to_install(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install .*\[deepspeed\]"):
        deepspeed_strategy(config_of(settings, tmp_path, run={"strategy": "deepspeed_stage_2"}))


def test_without_a_gpu_it_is_refused_before_anything_loads(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="Use ddp or fsdp2"):
        train(config_of(settings, tmp_path / "run", run={"strategy": "deepspeed_stage_2"}))


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"name": "train.tiny.muon.Muon"}},
        {"tune": {"kind": "full", "rounding": "stochastic"}},
        {"model": {"dit_low": ["low.safetensors"]}},
    ],
    ids=["optimizer-of-whole-matrices", "stochastic-rounding", "two-experts"],
)
def test_what_does_not_go_with_it_is_refused(
    settings: dict[str, Any], tmp_path: Path, sections: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentError, match="steps one optimizer on pieces of a long vector"):
        config_of(settings, tmp_path, run={"strategy": "deepspeed_stage_1"}, **sections)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("strategy", STAGES)
@pytest.mark.usefixtures("on_the_cpu")
def test_two_processes_equal_one(settings: dict[str, Any], tmp_path: Path, strategy: str, kind: str) -> None:
    sections = {"tune": {"kind": kind}, "optimizer": {"ema": 0.9, "clip_norm": 0.01}}
    alone = config_of(settings, tmp_path / "one", run={"steps": 3, "batch_size": 4}, **sections)
    both = config_of(
        settings, tmp_path / "two", run={"steps": 3, "batch_size": 1, "accumulate": 2, "strategy": strategy},
        **sections,
    )  # fmt: skip
    expected = train(alone)
    found, _ = on_two_ranks(both, tmp_path / "ranks")
    assert list(found.losses) == pytest.approx(expected.losses, rel=TOLERANCE)
    after, wanted = trained_tensors(found), trained_tensors(expected)
    assert after.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (after[name] - tensor).abs().max() <= TOLERANCE, name


@pytest.mark.distributed
@pytest.mark.parametrize("first", ["auto", "deepspeed_stage_1"])
@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_goes_on_as_if_it_had_not_stopped(settings: dict[str, Any], tmp_path: Path, first: str) -> None:
    """Also one that began under another strategy: a checkpoint holds whole states."""
    optimizer = {"name": "adamw", "learning_rate": 0.01, "ema": 0.9}
    run = {"strategy": "deepspeed_stage_2", "batch_size": 1}
    whole = config_of(settings, tmp_path / "whole", optimizer=optimizer, run={**run, "steps": 4})
    expected, _ = on_two_ranks(whole, tmp_path / "a")
    begun = config_of(
        settings, tmp_path / "cut", optimizer=optimizer, run={**run, "steps": 2, "strategy": first}
    )
    on_two_ranks(begun, tmp_path / "b")
    rest = config_of(
        settings, tmp_path / "cut", optimizer=optimizer, run={**run, "steps": 4, "resume": "latest"}
    )
    found, _ = on_two_ranks(rest, tmp_path / "c")
    assert list(found.losses) == pytest.approx(expected.losses[2:], rel=TOLERANCE)
    after, wanted = trained_tensors(found), trained_tensors(expected)
    for name, tensor in wanted.items():
        assert (after[name] - tensor).abs().max() <= TOLERANCE, name

"""Two processes equal one, with the same samples in each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.training.run import train
from tests.unit.training.toy_runs import (
    config_of,
    error_when_a_rank_dies,
    first_gradients,
    on_two_ranks,
    toy_settings,
    trained_tensors,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which CUDA does not survive")
# fp32: the sums over samples are taken in another order
TOLERANCE = 1e-5
STEPS = 5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return toy_settings(tmp_path_factory.mktemp("toy"))


def compare(settings: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> None:
    run = sections.pop("run", {})
    alone = config_of(settings, folder / "one", **sections, run={"steps": STEPS, "batch_size": 2})
    both = config_of(settings, folder / "two", **sections, run={"steps": STEPS, "batch_size": 1, **run})
    expected, expected_gradients = first_gradients(lambda: train(alone))
    found, gradients = on_two_ranks(both, folder / "ranks")
    torch.testing.assert_close(
        torch.tensor(found.losses), torch.tensor(expected.losses), rtol=TOLERANCE, atol=0
    )
    assert len(gradients) == len(expected_gradients)
    for one, two in zip(expected_gradients, gradients, strict=True):
        assert (one - two).norm() <= TOLERANCE * one.norm() + 1e-12
    after, wanted = trained_tensors(found), trained_tensors(expected)
    assert after.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (after[name] - tensor).abs().max() <= TOLERANCE, name
    assert any(
        (tensor != 0).any() for name, tensor in wanted.items() if "lora_B" in name or "lora" not in name
    )
    assert found.export is not None and found.export.is_file()


def test_ddp_equals_one_process(settings: dict[str, Any], tmp_path: Path) -> None:
    compare(settings, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("start", range(3))
def test_two_ranks_encode_and_train_in_one_go(tmp_path: Path, start: int) -> None:
    """By one group: a second one on torchrun's store met the first one's addresses, in every other start."""
    settings = toy_settings(tmp_path)
    for path in (tmp_path / "data").glob("*.tensors.safetensors"):
        path.unlink()
    run = {"task": "both", "steps": 2, "batch_size": 1}
    report, _ = on_two_ranks(config_of(settings, tmp_path / "out", run=run), tmp_path / "ranks")
    assert len(report.losses) == 2


@pytest.mark.distributed
def test_ddp_with_accumulation_equals_one_process(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "data": [{**settings["data"][0], "repeats": 2.0}]}
    alone = config_of(settings, tmp_path / "one", run={"steps": 3, "batch_size": 4})
    both = config_of(settings, tmp_path / "two", run={"steps": 3, "batch_size": 1, "accumulate": 2})
    expected, _ = first_gradients(lambda: train(alone))
    found, _ = on_two_ranks(both, tmp_path / "ranks")
    torch.testing.assert_close(
        torch.tensor(found.losses), torch.tensor(expected.losses), rtol=TOLERANCE, atol=0
    )


@pytest.mark.distributed
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fsdp2_equals_one_process(
    settings: dict[str, Any], tmp_path: Path, kind: str, checkpointing: str
) -> None:
    tune = {"kind": kind}
    compare(
        settings, tmp_path, tune=tune, run={"strategy": "fsdp2"},
        memory={"gradient_checkpointing": checkpointing},
        optimizer={"ema": 0.9, "learning_rate": 0.1 if kind == "lora" else 0.01},
    )  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fsdp2_measures_and_saves_in_one_step(settings: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """A pass without gradients leaves weights whole; what is saved after it must not be."""
    compare(
        settings, tmp_path, tune={"kind": kind}, run={"strategy": "fsdp2"},
        samples={"every": 2, "holdout": 1, "quantiles": [0.5]},
        optimizer={"ema": 0.9, "learning_rate": 0.1 if kind == "lora" else 0.01},
    )  # fmt: skip


@pytest.mark.distributed
def test_fsdp2_goes_on_from_its_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    optimizer = {"name": "adamw", "learning_rate": 0.01, "ema": 0.9}
    run = {"strategy": "fsdp2", "batch_size": 1}
    whole = config_of(settings, tmp_path / "whole", optimizer=optimizer, run={**run, "steps": 4})
    expected, _ = on_two_ranks(whole, tmp_path / "a")
    first = config_of(settings, tmp_path / "cut", optimizer=optimizer, run={**run, "steps": 2})
    on_two_ranks(first, tmp_path / "b")
    rest = {**run, "steps": 4, "resume": "latest"}
    found, _ = on_two_ranks(
        config_of(settings, tmp_path / "cut", optimizer=optimizer, run=rest), tmp_path / "c"
    )
    assert list(found.losses) == pytest.approx(
        expected.losses[2:], rel=1e-6
    )  # the same sums, on the same ranks


@pytest.mark.distributed
def test_a_rank_that_dies_is_told_with_the_last_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    run = {"batch_size": 1, "steps": 5, "save_every": 1, "timeout_s": 60}
    told = error_when_a_rank_dies(config_of(settings, tmp_path / "run", run=run), tmp_path / "ranks")
    assert "A process of the run ended or did not answer within 60 s" in told
    # the first rank still ends the step in which the other dies: its gradients are there
    assert "step=2.ckpt. Go on with run.resume: latest." in told

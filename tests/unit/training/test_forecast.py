from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffsynth.training.config import TrainConfig
from diffsynth.training.forecast import too_large
from diffsynth.training.loading import load_networks, plan_data
from diffsynth.training.objective import FlowMatchObjective
from tests.unit.training.toy_runs import config_of, toy_settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return toy_settings(tmp_path_factory.mktemp("toy"))


def told(config: TrainConfig, gpu_gb: float) -> list[str]:
    loaded = load_networks(config, FlowMatchObjective())
    return too_large(config, plan_data(config, loaded.facts), loaded, gpu_gb)


def test_a_bucket_that_will_not_fit_is_named_with_what_helps(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(settings, tmp_path)
    (line,) = told(config, gpu_gb=0.1)
    assert "is predicted to take" in line and "the GPU has 0.1 GB" in line and "memory.stream" in line
    assert told(config, gpu_gb=80.0) == []


def test_what_saves_memory_is_counted(settings: dict[str, Any], tmp_path: Path) -> None:
    def need(**sections: dict[str, Any]) -> float:
        (line,) = told(config_of(settings, tmp_path, **sections), gpu_gb=1e-6)
        return float(line.partition("take ")[2].partition(" GB")[0])

    many = {"batch_size": 10**7}  # arithmetic alone
    plain, full = need(run=many), need(run=many, memory={"gradient_checkpointing": "full"})
    assert full < plain


def test_a_moment_of_a_clip_is_counted_as_one_latent(settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(settings, tmp_path, run={"batch_size": 10**6})
    loaded = load_networks(config, FlowMatchObjective())
    plan = plan_data(config, loaded.facts)

    def need(moments: bool) -> float:
        clips = tuple(replace(clip, indices=tuple(range(81)), moments=moments) for clip in plan.clips)
        (line,) = too_large(config, replace(plan, clips=clips), loaded, 1e-6)
        return float(line.partition("take ")[2].partition(" GB")[0])

    assert need(moments=True) < need(moments=False) / 10  # one latent of 21

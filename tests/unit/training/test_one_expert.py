"""One expert of a pair in a run of its own: its timesteps, its role in every file, samples with it alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from diffsynth.errors import ArgumentError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.training import module as training_module
from diffsynth.training.run import RunReport, train
from tests.unit.training.toy_runs import config_of, rows, toy_settings


@pytest.fixture(scope="module")
def pair() -> dict[str, str]:
    high, low, *_ = toy_files("t2v", num_experts=2)
    return {"high": high, "low": low}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return toy_settings(tmp_path_factory.mktemp("toy"))


def timesteps_of(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], output: Path, **sections: Any
) -> tuple[RunReport, list[float]]:
    seen: list[float] = []
    finish = training_module.WanTrainingModule._finish

    def noting(self: Any, step: int, learner: Any) -> None:
        finish(self, step, learner)
        seen.extend(self.report.timesteps.tolist())

    with monkeypatch.context() as patch:
        patch.setattr(training_module.WanTrainingModule, "_finish", noting)
        return train(config_of(settings, output, **sections)), seen


@pytest.mark.parametrize("role", ["high", "low"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_trains_at_its_own_timesteps_and_its_files_tell_its_role(
    settings: dict[str, Any], pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    role: Any, kind: str,
) -> None:  # fmt: skip
    report, seen = timesteps_of(
        monkeypatch, settings, tmp_path / "out", model={"dit": [pair[role]]}, tune={"kind": kind},
        run={"steps": 6, "batch_size": 2},
    )  # fmt: skip
    assert len(seen) == 12 and all((t >= 875) == (role == "high") for t in seen)
    assert "loss_low_noise" not in rows(report)[0]  # columns of two
    assert report.checkpoint is not None and report.export is not None
    assert report.export.name.endswith(f"_{role}_noise.safetensors") and report.export.is_file()
    with safe_open(report.export, "pt") as file:
        assert file.metadata()["expert"] == role and file.metadata()["base_model"] == "dit.safetensors"
    for source, name in ((report.export, "style.safetensors"), (report.checkpoint, "style.ckpt")):
        neutral = tmp_path / name
        shutil.copy(source, neutral)
        manager = ModelManager(device="cpu")
        if kind == "full":
            assert manager.load_models([neutral]).loaded[0].match.role == role
        else:
            manager.load_models(list(pair.values()))
            (told,) = manager.load_lora(neutral)
            assert list(told.fitted) == [f"wan_video_dit ({role} noise)"]


def test_the_config_tells_the_role_where_the_path_does_not_and_may_undo_it(
    settings: dict[str, Any], pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = {"steps": 6, "batch_size": 2}
    with caplog.at_level("INFO", logger="diffsynth"):
        experts = {"role": "low", "boundary": 0.5}
        report, seen = timesteps_of(monkeypatch, settings, tmp_path / "a", experts=experts, run=run)
    assert max(seen) < 500 and report.export is not None and "_low_noise" in report.export.name
    assert "the low-noise expert of a pair (experts.role): it trains at timesteps 0 to 500" in caplog.text
    report, seen = timesteps_of(
        monkeypatch, settings, tmp_path / "b", experts={"role": "all"}, run=run, model={"dit": [pair["low"]]}
    )
    assert max(seen) > 875 and report.export is not None and "noise" not in report.export.name


def test_validation_and_samples_are_its_own(
    settings: dict[str, Any], pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    told: list[float] = []
    losses = training_module.WanTrainingModule.losses

    def noting(self: Any, *args: Any, sigma: float | None = None, **more: Any) -> Any:
        if sigma is not None:
            told.append(sigma)
        return losses(self, *args, sigma=sigma, **more)

    monkeypatch.setattr(training_module.WanTrainingModule, "losses", noting)
    samples = {"every": 2, "holdout": 1, "quantiles": [0.0, 1.0], "prompts": ["a ball"]}
    model, run = {"dit": [pair["low"]]}, {"steps": 2, "batch_size": 1}
    with caplog.at_level("INFO", logger="diffsynth"):
        train(config_of(settings, tmp_path, model=model, samples=samples, run=run))
    assert 0.8 < max(told) < 0.875 and min(told) < 0.01
    assert "Sample videos are made with it alone, at every step." in caplog.text
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"experts": {"boundary": 0.5}}, r"boundary is 0\.5, and nothing says which expert model\.dit is"),
        ({"experts": {"role": "middle"}}, r"experts\.role"),
        ({"experts": {"role": "low", "turn": 3}}, r"for two, but for role and boundary"),
        ({"model": "both", "experts": {"role": "low"}}, "names a second; leave one of them out"),
        ({"model": "reversed"}, "say the opposite of themselves.*Exchange them"),
        ({"model": "low-alone"}, r"For the low-noise expert alone too: model\.dit, and experts\.role low"),
        ({"model": "high", "objective": {"max_timestep": 500.0}}, "No noise level is drawn between"),
    ],
    ids=["boundary", "unknown", "of-two", "both", "reversed", "dit-low-alone", "without-levels"],
)
def test_what_cannot_be_meant_is_refused(
    settings: dict[str, Any], pair: dict[str, str], tmp_path: Path, sections: dict[str, Any], expected: str
) -> None:
    models = {
        "both": {"dit": [pair["high"]], "dit_low": [pair["low"]]},
        "reversed": {"dit": [pair["low"]], "dit_low": [pair["high"]]},
        "low-alone": {"dit": [], "dit_low": [pair["low"]]},
        "high": {"dit": [pair["high"]]},
    }
    more = {**sections, **({"model": models[sections["model"]]} if "model" in sections else {})}
    with pytest.raises(ArgumentError, match=expected):
        train(config_of(settings, tmp_path, **more))

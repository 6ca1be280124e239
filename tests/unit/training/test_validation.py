"""What a run measures and shows of itself, and that it changes nothing."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.models.toy import toy_files
from diffsynth.training import run as training_run
from diffsynth.training import validation
from diffsynth.training.cached_dataset import CachedDataset, open_cache
from diffsynth.training.config import SampleConfig, TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.dataset.clips import DatasetPlan
from diffsynth.training.loading import load_networks
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.recompute import StreamedBase
from diffsynth.training.run import train
from diffsynth.training.validation import num_held_out, split
from diffsynth.vram_management.residency import Residency
from tests.unit.training.clips_of_noise import (
    FRAMES,
    HEIGHT,
    WIDTH,
    pictures,
    write_picture,
    write_video,
)
from tests.unit.training.test_cached_dataset import cache
from tests.unit.training.toy_runs import ADAMW, config_of, rows, toy_settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return toy_settings(tmp_path_factory.mktemp("toy"))


def test_validation_stands_beside_the_loss_and_its_samples_are_not_trained(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    samples = {"every": 2, "holdout": 2, "quantiles": [0.2, 0.8]}
    report = train(config_of(settings, tmp_path, samples=samples, run={"steps": 4, "batch_size": 1}))
    told = [row["validation_loss"] for row in rows(report)]
    assert [bool(text) for text in told] == [False, True, False, True]
    assert report.folder is not None
    with (report.folder / "others.csv").open() as file:
        others = [(row["step"], row["name"]) for row in csv.DictReader(file)]
    assert others == [(s, f"validation_loss_q{q}") for s in "024" for q in ("0.2", "0.8")]
    assert "holdout: 2" in (report.folder / "config.yaml").read_text()


def test_validation_measures_the_average_that_is_exported(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Tensor] = []
    look = validation.validation_losses

    def noting(module: Any, *rest: Any) -> Tensor:
        measured.append(next(iter(module.learners[0].parameters().values())).detach().clone())
        return look(module, *rest)

    monkeypatch.setattr(validation, "validation_losses", noting)
    samples = {"every": 2, "holdout": 1, "quantiles": [0.5]}
    report = train(
        config_of(settings, tmp_path, optimizer=ADAMW, samples=samples, run={"steps": 2, "batch_size": 1})
    )
    assert report.checkpoint is not None
    content = torch.load(report.checkpoint, weights_only=True)
    name = next(iter(content["state_dict"]))
    assert torch.equal(measured[-1], content["diffsynth"]["averages"][0][name])
    assert not torch.equal(measured[-1], content["state_dict"][name])


def test_other_samples_of_a_file_that_is_measured_are_not_trained_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    twice = {**settings, "data": [*settings["data"], {**settings["data"][0], "name": "again"}]}
    config = config_of(twice, tmp_path, samples={"every": 1, "holdout": 2}, run={"steps": 1, "batch_size": 1})
    run = training_run.Run(
        config, torch.device("cpu"), training_run.Ranks(devices=1, nodes=1, rank=0, is_external=False)
    )
    samples = run._samples
    trained, held_out = validation.split(samples, 2, 1)
    measured = {samples.source(index) for index in held_out}
    assert len(samples) == 12 and not measured & {samples.source(index) for index in trained}
    assert len(trained) == 12 - 2 * len(measured)


def of_files(folder: Path, count: int) -> CachedDataset:
    """So many files, two clips of each."""
    plan = pictures(folder, count)
    mirrored = [replace(clip, flip=True) for clip in plan.clips]
    clips = (*plan.clips, *mirrored)
    for number, one in enumerate(clips):
        cache(one, f"{number:016x}")
    return open_cache(DatasetPlan(clips=clips))


@pytest.mark.parametrize(("files", "measured"), [(5, 0), (19, 0), (20, 1), (45, 2)])
def test_one_of_twenty_files_is_held_out_and_of_fewer_none(tmp_path: Path, files: int, measured: int) -> None:
    samples, usual = of_files(tmp_path, files), SampleConfig(every=10)
    assert num_held_out(usual, samples, {}) == measured
    trained, held_out = split(samples, measured, 10)
    assert len(held_out) == measured and len(trained) == 2 * (files - len({*map(samples.source, held_out)}))
    assert num_held_out(replace(usual, holdout=3), samples, {}) == 3, "a number keeps its meaning"
    assert num_held_out(replace(usual, every=0), samples, {}) == 0
    assert num_held_out(replace(usual, prompts=("a ball",)), samples, {}) == 0, (
        "videos alone hold out nothing"
    )
    assert num_held_out(usual, samples, {"held out": "4"}) == 4, "a run begun before keeps its number"


def test_files_that_are_held_out_are_named_and_stay_so_when_the_run_goes_on(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = {"steps": 1, "batch_size": 1}
    with caplog.at_level("INFO", "diffsynth"):
        train(config_of(settings, tmp_path, samples={"every": 1, "holdout": 2}, run=run))
    (told,) = [text for text in caplog.messages if text.startswith("Held out")]
    assert re.search(r"2 files: \d\.png, \d\.png\. 4 of 6 clips are trained on", told)
    caplog.clear()
    with caplog.at_level("INFO", "diffsynth"):
        train(
            config_of(settings, tmp_path, samples={"every": 1}, run={**run, "steps": 2, "resume": "latest"})
        )
    assert told in caplog.messages and "held out was" not in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "diffsynth"):  # a run of its own holds out none of six files, and says so
        train(config_of(settings, tmp_path / "other", samples={"every": 1}, run=run))
    assert "Held out" not in caplog.text and "nothing to look at" in caplog.text


def test_prompts_become_videos_and_training_goes_on_the_same(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    samples = {"every": 1, "holdout": 0, "prompts": ["a red circle"], "num_inference_steps": 1}
    run = {"steps": 2, "batch_size": 1}
    shown = train(config_of(settings, tmp_path / "shown", samples=samples, run=run))
    plain = train(config_of(settings, tmp_path / "plain", run=run))
    assert shown.losses == plain.losses
    names = sorted(path.name for path in (tmp_path / "shown" / "samples").iterdir())
    assert names == [f"step={step}-1.mp4" for step in range(3)]


def test_sample_videos_of_an_image_to_video_model_begin_with_its_pictures(tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "a.mp4")
    (tmp_path / "data" / "a.txt").write_text("a ball")
    picture = write_picture(tmp_path / "first.png", seed=3)
    dit, text_encoder, vae, image_encoder = toy_files("i2v")
    made = {
        "model": {"dit": [dit], "text_encoder": text_encoder, "vae": vae, "image_encoder": image_encoder,
                  "dtype": "float32", "device": "cpu"},
        "data": [{"path": str(tmp_path / "data"), "sizes": [[HEIGHT, WIDTH]], "num_frames": [FRAMES],
                  "fps": "native"}],
        "tune": {"rank": 4}, "run": {"output": str(tmp_path / "out"), "steps": 1, "workers": 0},
        "samples": {"every": 1, "holdout": 0, "prompts": ["a ball"], "input_images": [str(picture)],
                    "num_inference_steps": 1, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES},
    }  # fmt: skip
    train(build(TrainConfig, made, ""))
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == [
        "step=0-1.mp4", "step=1-1.mp4",
    ]  # fmt: skip


def test_a_dit_that_training_streams_is_left_where_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    """Sample videos are made by a pipeline; brought in whole, a streamed DiT would fill the GPU."""
    dit = load_networks(config_of(settings, tmp_path), FlowMatchObjective()).learners[0].denoiser.dit
    stream = StreamedBase([dit], torch.device("cpu"))
    residency = Residency({"dit": dit}, torch.device("meta"))
    residency.enter("dit")
    assert {parameter.device.type for parameter in dit.parameters()} == {"cpu"}
    residency.close()
    stream.close()
    with pytest.raises(RuntimeError, match="incompatible tensor type"):  # what moves nothing cannot raise
        Residency({"dit": dit}, torch.device("meta")).enter("dit")

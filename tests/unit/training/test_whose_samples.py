"""Which cached samples a run trains on: its own, whatever was encoded last."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth.errors import ArgumentError
from diffsynth.models.toy import toy_files
from diffsynth.training import v1_flags
from diffsynth.training.cache_keys import Maker
from diffsynth.training.cached_dataset import CachedDataset
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.loading import encoding_pipeline, facts_of, maker_of
from diffsynth.training.processes import Ranks
from diffsynth.training.run import Run, train
from tests.unit.training import toy_runs
from tests.unit.training.clips_of_noise import HEIGHT, WIDTH
from tests.unit.training.toy_runs import config_of


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(toy_runs, "NUM_PICTURES", 2)
    return toy_runs.toy_settings(tmp_path)


def opened(config: TrainConfig) -> CachedDataset:
    ranks = Ranks(devices=1, nodes=1, rank=0, is_external=False)
    return Run(config, torch.device("cpu"), ranks)._samples


def encode(settings: dict[str, Any], folder: Path, **sections: Any) -> None:
    train(config_of(settings, folder, run={"task": "data_process"}, **sections))


def changed_file(path: str, folder: Path) -> str:
    """The same network with other weights."""
    tensors = load_file(path)
    name = next(n for n in tensors if tensors[n].ndim > 1)
    tensors[name].view(-1)[0] += 1
    folder.mkdir()
    for beside in Path(path).parent.iterdir():
        if beside.suffix != ".safetensors":  # the tokenizer
            (shutil.copytree if beside.is_dir() else shutil.copy)(beside, folder / beside.name)
    with safe_open(path, "pt") as file:
        save_file(tensors, folder / Path(path).name, file.metadata())
    return str(folder / Path(path).name)


@pytest.mark.parametrize("what", ["tiled", "cache-dtype", "model-dtype", "vae", "text-encoder"])
def test_a_run_trains_on_its_own_samples_after_another_run_encoded(
    settings: dict[str, Any], tmp_path: Path, what: str
) -> None:
    other: dict[str, Any] = {
        "tiled": {"cache": {"tiled": True}},
        "cache-dtype": {"cache": {"dtype": "bfloat16"}},
        "model-dtype": {"model": {"dtype": "bfloat16"}},
        "vae": {"model": {"vae": changed_file(settings["model"]["vae"], tmp_path / "vae")}},
        "text-encoder": {
            "model": {"text_encoder": changed_file(settings["model"]["text_encoder"], tmp_path / "t5")}
        },
    }[what]
    before = opened(config_of(settings, tmp_path / "a"))
    with pytest.raises(ArgumentError, match=r"2 of 2 clips have no sample of this run.*as .*\.png"):
        opened(config_of(settings, tmp_path / "b", **other))
    encode(settings, tmp_path / "cache", **other)
    between = opened(config_of(settings, tmp_path / "b", **other))
    encode(settings, tmp_path / "cache")  # nothing is left to do
    after = opened(config_of(settings, tmp_path / "a"))
    ids, others = ({s.sample_id(i) for i in range(len(s))} for s in (after, between))
    assert ids == {before.sample_id(i) for i in range(len(before))} and not ids & others


def test_two_makers_and_no_word_of_which_is_an_error_that_names_both(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    vae = changed_file(settings["model"]["vae"], tmp_path / "vae")
    encode(settings, tmp_path / "cache", model={"vae": vae})
    without = {"vae": None, "text_encoder": None}
    with pytest.raises(ArgumentError, match=r"two makers \(vae: \w+ and \w+ \(model\.vae"):
        opened(config_of(settings, tmp_path / "a", model=without))
    with pytest.raises(ArgumentError, match="two makers"):  # nor where the file is not on this machine
        opened(config_of(settings, tmp_path / "a", model={"vae": "gone.pth"}))
    half = opened(config_of(settings, tmp_path / "a", model={"text_encoder": None}))
    assert {half[i].meta["vae"] for i in range(2)} == {half[0].meta["vae"]}


def test_training_needs_no_encoder_where_one_maker_was_at_work(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    without = config_of(settings, tmp_path / "a", model={"vae": None, "text_encoder": "gone/t5.pth"})
    assert len(opened(without)) == 2


@pytest.mark.parametrize(
    ("kind", "dtype"), [("t2v", "bfloat16"), ("flf2v", "float32"), ("ti2v", "float32"), ("vace", "fp8")]
)
def test_headers_tell_the_maker_that_loaded_encoders_tell(kind: str, dtype: str, tmp_path: Path) -> None:
    dit, text_encoder, vae, *image_encoder = toy_files(kind)
    model = {
        "dit": [dit], "text_encoder": text_encoder, "vae": vae, "dtype": dtype, "device": "cpu",
        "image_encoder": image_encoder[0] if image_encoder else None,
    }  # fmt: skip
    config: TrainConfig = build(TrainConfig, {"model": model, "data": [{"path": "x"}]}, "")
    facts = facts_of(config.model)
    loaded = Maker.of(encoding_pipeline(config, facts, torch.device("cpu")).parts, config.cache)
    told = maker_of(config, facts)
    assert told.facts == loaded.facts and told.about == loaded.about and told.tokenizer is not None


def v1_words(settings: dict[str, Any], *words: str) -> list[str]:
    model = settings["model"]
    return [
        "--task", "data_process", "--dataset_path", settings["data"][0]["path"], "--vae_path", model["vae"],
        "--text_encoder_path", model["text_encoder"], "--height", str(HEIGHT), "--width", str(WIDTH),
        "--num_frames", "1", "--dit_path", model["dit"][0], *words,
    ]  # fmt: skip


def test_v1s_training_is_on_what_its_data_process_encoded_last(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["--task", "train", "--dataset_path", settings["data"][0]["path"]]
    line += ["--dit_path", settings["model"]["dit"][0]]
    seen = []
    for words in ((), ("--tiled",), ("--height", "16"), ()):
        v1_flags.run(v1_words(settings, *words, "--output_path", "encoded"))
        config = v1_flags.config_of(v1_flags.parsed(line))
        samples = opened(replace(config, run=replace(config.run, output=str(tmp_path / "out"))))
        seen.append([samples[i].meta for i in range(len(samples))])
    assert all(len(metas) == 2 for metas in seen)
    assert [bool(metas[0]["tiles"]) for metas in seen] == [False, True, False, False]
    heights = [json.loads(metas[0]["transform"])["height"] for metas in seen]
    assert heights == [HEIGHT, HEIGHT, 16, HEIGHT] and seen[0] == seen[3]

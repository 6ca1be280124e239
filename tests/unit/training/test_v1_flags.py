from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.errors import (
    ArgumentError,
    DiffSynthError,
    MediaNotFoundError,
    MissingPackageError,
    UnknownArgumentError,
)
from diffsynth.training import v1_flags
from diffsynth.training.config import TrainConfig
from diffsynth.training.dataset.config import v1_dataset
from diffsynth.training.v1_flags import FLAGS, config_of, parsed

# v1's parser: every flag with its default
DEFAULTS: dict[str, Any] = {
    "task": None, "dataset_path": None, "output_path": "./", "text_encoder_path": None,
    "image_encoder_path": None, "vae_path": None, "dit_path": None, "tiled": None, "tile_size_height": 34,
    "tile_size_width": 34, "tile_stride_height": 18, "tile_stride_width": 16, "steps_per_epoch": 500,
    "num_frames": 81, "height": 480, "width": 832, "dataloader_num_workers": 1, "learning_rate": 1e-5,
    "accumulate_grad_batches": 1, "max_epochs": 1, "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
    "init_lora_weights": "kaiming", "training_strategy": "auto", "lora_rank": 4, "lora_alpha": 4.0,
    "use_gradient_checkpointing": None, "use_gradient_checkpointing_offload": None,
    "train_architecture": "lora", "pretrained_lora_path": None, "use_swanlab": None, "swanlab_mode": None,
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names alone: nothing here reads them."""
    models = "dit.safetensors part1.safetensors part2.safetensors t5.pth vae.pth clip.pth"
    for name in models.split():
        (tmp_path / name).touch()
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(*words: str) -> TrainConfig:
    return config_of(
        parsed(["--task", "train", "--dataset_path", "data", "--dit_path", "dit.safetensors", *words])
    )


def encoding(*words: str) -> TrainConfig:
    line = ["--task", "data_process", "--dataset_path", "data", "--text_encoder_path", "t5.pth"]
    return config_of(parsed([*line, "--vae_path", "vae.pth", *words]))


def test_every_flag_of_v1_is_there_with_its_default() -> None:
    assert {flag.name: flag.default for flag in FLAGS} == DEFAULTS


@pytest.mark.usefixtures("files")
def test_training_by_default_is_that_of_v1() -> None:
    config = training()
    assert config.data == (v1_dataset("data"),) and config.data[0].fps == "native"
    assert (config.tune.kind, config.tune.rank, config.tune.alpha) == ("lora", 4, 4.0)
    optimizer, objective = config.optimizer, config.objective
    assert (optimizer.learning_rate, optimizer.clip_norm, optimizer.ema) == (1e-5, 0, 0)
    assert (optimizer.name, optimizer.schedule, config.model.dtype) == ("adamw", "constant", "bfloat16")
    assert (objective.levels, objective.shift, objective.weighting) == ("v1", 5.0, "bell")
    assert config.memory.gradient_checkpointing == "none" and not config.memory.offload
    assert (config.run.steps, config.run.save_every, config.run.keep_last) == (500, 500, 0)
    assert (config.run.output, config.run.batch_size, config.run.strategy) == ("./", 1, "auto")


@pytest.mark.usefixtures("files")
def test_each_flag_of_training_reaches_its_setting() -> None:
    config = training(
        "--dit_path", "part1.safetensors,part2.safetensors", "--pretrained_lora_path", "clip.pth",
        "--use_gradient_checkpointing", "--use_gradient_checkpointing_offload", "--lora_rank", "16",
        "--lora_alpha", "8", "--lora_target_modules", "q, v", "--init_lora_weights", "gaussian",
        "--training_strategy", "fsdp2", "--learning_rate", "1e-4", "--steps_per_epoch", "10",
        "--max_epochs", "3", "--accumulate_grad_batches", "4", "--dataloader_num_workers", "2",
        "--output_path", "models", "--num_frames", "49", "--height", "320", "--width", "512",
    )  # fmt: skip
    assert config.model.dit == ("part1.safetensors", "part2.safetensors")
    assert (config.memory.gradient_checkpointing, config.memory.offload) == ("full", True)
    assert (config.tune.rank, config.tune.alpha, config.tune.init) == (16, 8.0, "gaussian")
    assert config.tune.targets == ("q", "v") and config.optimizer.learning_rate == 1e-4
    assert (config.run.strategy, config.run.start_from) == ("fsdp2", "clip.pth")
    assert config.data == (v1_dataset("data", num_frames=49, height=320, width=512),)
    # 10 samples in steps of 4 are 3 steps: the last one of an epoch is short in v1, and full here
    assert (config.run.accumulate, config.run.steps, config.run.save_every) == (4, 9, 3)
    assert (config.run.workers, config.run.output, config.run.steps_per_epoch) == (2, "models", 3)


@pytest.mark.usefixtures("files")
def test_each_flag_of_data_process_reaches_its_setting() -> None:
    config = encoding(
        "--image_encoder_path", "clip.pth", "--tiled", "--tile_size_height", "20", "--tile_size_width", "24",
        "--tile_stride_height", "10", "--tile_stride_width", "12", "--dataloader_num_workers", "0",
    )  # fmt: skip
    assert config.run.task == "data_process"
    assert (config.model.text_encoder, config.model.vae) == ("t5.pth", "vae.pth")
    assert config.model.image_encoder == "clip.pth"
    assert config.cache.tiled and config.cache.workers == 1
    assert (config.cache.tile_size, config.cache.tile_stride) == ((20, 24), (10, 12))
    plain = encoding().cache
    assert (plain.tiled, plain.tile_size, plain.tile_stride) == (False, (34, 34), (18, 16))


@pytest.mark.usefixtures("files")
def test_an_epoch_is_shared_by_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert training("--max_epochs", "2").run.steps == 2 * 63  # 500 / 8, the last one filled up


@pytest.mark.usefixtures("files")
def test_the_offload_flag_turns_on_what_it_rests_on() -> None:
    assert training("--use_gradient_checkpointing_offload").memory.gradient_checkpointing == "full"


@pytest.mark.usefixtures("files")
def test_a_flag_that_the_task_does_not_read_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "diffsynth"):
        plain = encoding("--learning_rate", "1e-4", "--tile_size_height", "64")
        full = training("--train_architecture", "full", "--lora_rank", "0", "--vae_path", "gone.pth")
    assert "--learning_rate is not used: --task data_process does not read it" in caplog.text
    assert "--tile_size_height is not used: --tiled is not given" in caplog.text
    assert plain.cache.tile_size == (34, 34)
    assert "--lora_rank is not used: --train_architecture full" in caplog.text
    assert "--vae_path is not used: --task train" in caplog.text
    assert full.tune.kind == "full"


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        ("--lora_rnk 4", UnknownArgumentError, "Did you mean 'lora_rank'"),
        ("--height tall", ArgumentError, "--height: invalid int value: 'tall'"),
        ("stray", ArgumentError, "'stray' follows no flag"),
        ("--train_architecture lokr", ArgumentError, "invalid choice: 'lokr'"),
        ("--lora_rank 0", ArgumentError, "lora_rank is 0; give 1 or more"),
        ("--lora_alpha -1", ArgumentError, "lora_alpha is -1"),
        ("--num_frames 80", ArgumentError, "80 -> 77 or 81"),
        ("--max_epochs 0", ArgumentError, "--max_epochs is 0; give 1 or more"),
        ("--accumulate_grad_batches 0", ArgumentError, "accumulate is 0"),
        ("--learning_rate 0", ArgumentError, "learning_rate is 0"),
        ("--dit_path part1.safetensors,gone.safetensors", MediaNotFoundError, "--dit_path: gone.safetensors"),
        ("--dit_path ,", ArgumentError, "--dit_path is empty"),
        ("--pretrained_lora_path gone.ckpt", MediaNotFoundError, "--pretrained_lora_path: gone.ckpt"),
        ("--use_swanlab", MissingPackageError, "--use_swanlab needs it: pip install swanlab"),
        ("--swanlab_mode local", ArgumentError, "without --use_swanlab"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(
    files: Path, monkeypatch: pytest.MonkeyPatch, words: str, error: type[Exception], told: str
) -> None:
    monkeypatch.setattr(v1_flags, "find_spec", lambda name: None)
    assert issubclass(error, DiffSynthError)
    with pytest.raises(error, match=told):
        training(*words.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "--task is missing"),
        ("--task train --dataset_path data", "--task train needs --dit_path"),
        ("--task data_process --dataset_path data --vae_path vae.pth", "needs --text_encoder_path"),
        ("--task data_process --text_encoder_path t5.pth --vae_path vae.pth", "needs --dataset_path"),
    ],
)
def test_a_missing_flag_is_named(files: Path, words: str, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        config_of(parsed(words.split()))


@pytest.mark.parametrize(
    ("given", "taken"),
    [(name, name) for name in ("deepspeed_stage_1", "deepspeed_stage_2")] + [("deepspeed_stage_3", "fsdp2")],
)
@pytest.mark.usefixtures("files")
def test_stages_of_deepspeed_are_its_own_but_for_the_third(
    given: str, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    line = "--task train --dataset_path data --dit_path dit.safetensors --training_strategy"
    with caplog.at_level("WARNING", "diffsynth"):
        config = config_of(parsed([*line.split(), given]))
    assert config.run.strategy == taken
    assert (f"{given} runs as fsdp2" in caplog.text) == (given != taken)


@pytest.mark.usefixtures("files")
def test_swanlab_gets_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v1_flags, "find_spec", lambda name: object())
    monkeypatch.setattr("diffsynth.training.run.train", lambda config: config)
    monkeypatch.setenv("SWANLAB_MODE", "cloud")
    line = "--task train --dataset_path data --dit_path dit.safetensors --use_swanlab --swanlab_mode offline"
    config: Any = v1_flags.run(line.split())
    assert config.run.loggers == ("swanlab",) and os.environ["SWANLAB_MODE"] == "offline"


def test_data_process_keeps_one_folder_of_settings(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsynth.training.run.train", lambda config: None)
    line = "--task data_process --dataset_path data --text_encoder_path t5.pth --vae_path vae.pth"
    logs = files / "lightning_logs"
    for _ in range(2):
        v1_flags.run(line.split())
        assert [path.name for path in logs.iterdir()] == ["version_0"]
    (logs / "version_0" / "metrics.csv").touch()  # a run began there
    v1_flags.run(line.split())
    assert (logs / "version_1" / "config.yaml").is_file()


def test_a_cache_of_v1_says_its_size(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = {"context": torch.ones(1, 512, 8)}
    content = {"latents": torch.zeros(16, 3, 4, 6), "prompt_emb": text, "image_emb": {}}
    torch.save(content, files / "data" / "train" / "a.mp4.tensors.pth")
    with caplog.at_level(logging.INFO, "diffsynth"):
        assert training().data == (v1_dataset("data", num_frames=9, height=32, width=48),)
    assert "As in a.mp4.tensors.pth, which was encoded last: --num_frames 9" in caplog.text

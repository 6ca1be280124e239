"""Fun models of Wan2.2 5B: encoded without the DiT, in the latents of their own VAE, and trained."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from diffsynth.models.toy import toy_files
from diffsynth.training.cached_dataset import open_cache
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.run import train
from tests.unit.training.clips_of_noise import FRAMES, write_picture, write_video
from tests.unit.training.toy_runs import config_of, trained_tensors

SIZE = (32, 64)  # multiples of 32
COLUMNS: dict[str, dict[str, str]] = {
    "i2v-5b": {},
    "camera-5b": {"camera_control_direction": "Left"},
    "control-5b": {"control_video": "control.mp4", "reference_image": "who.png"},
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_fun_model_is_encoded_without_its_dit_and_trains(tmp_path: Path, kind: str) -> None:
    columns = COLUMNS[kind]
    write_video(tmp_path / "data" / "a.mp4")
    write_video(tmp_path / "conditions" / "control.mp4", seed=1)
    write_picture(tmp_path / "conditions" / "who.png", seed=2)
    given = {
        name: f"../conditions/{value}" if value.endswith((".mp4", ".png")) else value
        for name, value in columns.items()
    }
    with (tmp_path / "data" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "prompt", *given], ["a.mp4", "a ball", *given.values()]])
    dit, text_encoder, vae = toy_files(kind)
    settings: dict[str, Any] = {
        "model": {"dit": [dit], "text_encoder": text_encoder, "vae": vae, "dtype": "float32",
                  "device": "cpu"},
        "data": [{"path": str(tmp_path / "data"), "sizes": [list(SIZE)], "num_frames": [FRAMES],
                  "fps": "native"}],
        "cache": {"dtype": "float32"}, "tune": {"rank": 4}, "optimizer": {"learning_rate": 0.1},
        "run": {"task": "data_process", "output": str(tmp_path / "cache"), "workers": 0},
    }  # fmt: skip
    train(build(TrainConfig, settings, ""))
    sample = open_cache(tmp_path / "data")[0]
    assert sample.latents.shape == (1, 48, (FRAMES - 1) // 4 + 1, SIZE[0] // 16, SIZE[1] // 16)
    assert {plane.shape[2:] for plane in sample.positive.planes.values()} == {sample.latents.shape[2:]}
    report = train(config_of(settings, tmp_path / "out", run={"steps": 2}))
    assert any((tensor != 0).any() for name, tensor in trained_tensors(report).items() if "lora_B" in name)

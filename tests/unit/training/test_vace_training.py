"""VACE: pictures that it refers to stand in front of the clip, and are learnt with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.models.toy import toy_files
from diffsynth.training.cached_dataset import open_cache
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.run import train
from tests.unit.training.clips_of_noise import FRAMES, HEIGHT, WIDTH, write_picture, write_video


def test_pictures_that_vace_refers_to_are_part_of_what_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "data" / "a.mp4")
    write_video(tmp_path / "data" / "control.mp4", seed=1)
    write_picture(tmp_path / "data" / "who.png", seed=2)
    (tmp_path / "data" / "metadata.csv").write_text(
        "video,prompt,vace_video,vace_reference_image\na.mp4,a ball,control.mp4,who.png\n"
    )
    dit, text_encoder, vae, *more = toy_files("vace")
    made = {
        "model": {"dit": [dit], "adapters": list(more), "text_encoder": text_encoder, "vae": vae,
                  "dtype": "float32", "device": "cpu"},
        "data": [{"path": str(tmp_path / "data"), "sizes": [[HEIGHT, WIDTH]], "num_frames": [FRAMES],
                  "fps": "native"}],
        "cache": {"dtype": "float32"}, "tune": {"rank": 4},
        "run": {"output": str(tmp_path / "out"), "steps": 1, "workers": 0},
    }  # fmt: skip
    seen: list[Tensor] = []
    losses = FlowMatchObjective.losses

    def noting(self: FlowMatchObjective, velocity: Tensor, latents: Tensor, *rest: Any) -> Tensor:
        seen.append(latents)
        return losses(self, velocity, latents, *rest)

    monkeypatch.setattr(FlowMatchObjective, "losses", noting)
    train(build(TrainConfig, made, ""))
    sample = open_cache(tmp_path / "data")[0]
    context = sample.positive.adapters["vace"].context  # type: ignore[attr-defined]
    assert sample.plan.extra_frames == 1 and seen[0].shape[2] == sample.latents.shape[2] + 1
    assert torch.equal(seen[0][:, :, :1], context[:, :16, :1]) and torch.equal(
        seen[0][:, :, 1:], sample.latents
    )

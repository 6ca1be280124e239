"""TI2V-5B: a given first frame is clean for the network, has its own clock, and is no task."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.models.toy import toy_files
from diffsynth.models.wan.dit import WanDiT
from diffsynth.training.cached_dataset import open_cache
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.run import train
from tests.unit.training.clips_of_noise import FRAMES, write_picture, write_video
from tests.unit.training.toy_runs import config_of, trained_tensors

SIZE = (32, 64)  # multiples of 32


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two clips with a first frame, two without, encoded by the Wan2.2 VAE."""
    folder = tmp_path_factory.mktemp("ti2v")
    data = folder / "data"
    lines = [["video", "prompt", "input_image"]]
    for number in range(4):
        write_video(data / f"{number}.mp4", seed=number)
        write_picture(data / "first" / f"{number}.png", seed=10 + number)
        lines.append([f"{number}.mp4", f"a ball {number}", f"first/{number}.png" if number < 2 else ""])
    with (data / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    dit, text_encoder, vae = toy_files("ti2v")
    made = {
        "model": {
            "dit": [dit],
            "text_encoder": text_encoder,
            "vae": vae,
            "dtype": "float32",
            "device": "cpu",
        },
        "data": [{"path": str(data), "sizes": [list(SIZE)], "num_frames": [FRAMES], "fps": "native"}],
        "cache": {"dtype": "float32"},
        "tune": {"rank": 4, "alpha": 8.0},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "run": {"task": "data_process", "output": str(folder / "cache"), "batch_size": 1, "workers": 0},
    }
    train(build(TrainConfig, made, ""))
    return made


def test_clips_are_encoded_for_it_without_a_dit_where_the_vae_is_its_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    write_video(tmp_path / "data" / "a.mp4")
    (tmp_path / "data" / "a.txt").write_text("a ball")
    model = {**settings["model"], "dit": []}
    data = [{**settings["data"][0], "path": str(tmp_path / "data")}]
    run = {**settings["run"], "output": str(tmp_path / "cache")}
    train(build(TrainConfig, {**settings, "model": model, "data": data, "run": run}, ""))
    assert open_cache(tmp_path / "data")[0].latents.shape[1] == 48
    made = config_of({**settings, "data": data}, tmp_path / "out", run={"steps": 1, "batch_size": 1})
    assert train(made).step == 1


def test_a_first_frame_is_clean_for_the_network_and_out_of_the_loss(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    forward, losses = WanDiT.forward, FlowMatchObjective.losses

    def noting(self: WanDiT, latents: Tensor, timestep: Tensor, *rest: Any) -> Any:
        seen.append({"latents": latents.clone(), "timestep": timestep.clone()})
        return forward(self, latents, timestep, *rest)

    def judging(self: FlowMatchObjective, velocity: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor,
                num_pinned: int = 0) -> Tensor:  # fmt: skip
        if num_pinned:  # whatever the network says of the first frame, the loss is the same
            velocity = torch.cat([velocity[:, :, :1] + 1e6, velocity[:, :, 1:]], dim=2)
        found = losses(self, velocity, latents, noise, sigma, num_pinned)
        error = (velocity - noise + latents)[:, :, num_pinned:].square().mean() * self.weight(sigma)[0]
        # fp32: the sums are taken in another order
        torch.testing.assert_close(found[0], error, rtol=1e-5, atol=0)
        seen[-1] |= {"sigma": sigma, "noise": noise, "clean": latents}
        return found

    monkeypatch.setattr(WanDiT, "forward", noting)
    monkeypatch.setattr(FlowMatchObjective, "losses", judging)
    report = train(config_of(settings, tmp_path, run={"steps": 4, "batch_size": 1}))
    assert all(loss < 100 for loss in report.losses)
    assert any((t != 0).any() for name, t in trained_tensors(report).items() if "lora_B" in name)

    samples = open_cache([Path(settings["data"][0]["path"])])
    firsts = [p for i in range(len(samples)) if (p := samples[i].plan.pinned) is not None]
    assert len(firsts) == 2 and all(first.shape == (1, 48, 1, 2, 4) for first in firsts)
    with_first = [one for one in seen if one["timestep"].ndim == 2]
    assert len(with_first) == 2 and len(seen) == 4  # the other clips are told one time for all frames
    for one in with_first:
        assert any(torch.equal(one["latents"][:, :, :1], first) for first in firsts)
        assert one["timestep"][0, 0] == 0 and one["timestep"][0, 1] == 1000 * one["sigma"][0]
        mixed = (1 - one["sigma"]) * one["clean"] + one["sigma"] * one["noise"]
        torch.testing.assert_close(one["latents"][:, :, 1:], mixed[:, :, 1:].float(), rtol=1e-5, atol=1e-5)

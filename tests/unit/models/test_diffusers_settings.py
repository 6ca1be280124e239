"""What a diffusers repository says beside its weights is used: noise levels, statistics of latents."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth.conditioning.text_cache import fingerprint
from diffsynth.errors import ConfigurationError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.vae import LATENT_MEAN, LATENT_STD, VAEConfig, WanVideoVAE
from diffsynth.pipelines.request import usual_values
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.toys import TOY_DIT, TOY_VAE, write_toy, write_toy_dit

UNIPC = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0, "use_dynamic_shifting": False}
MEAN, STD = [0.5 + i / 100 for i in range(16)], [2.0 + i / 10 for i in range(16)]


def repository(folder: Path, scheduler: object = None, vae: object = None) -> Path:
    """Folders as diffusers names them; the DiT's file tells no defaults of its own."""
    write_toy(folder / "transformer" / "model.safetensors", WanDiT(TOY_DIT), TOY_DIT)
    write_toy(folder / "vae" / "model.safetensors", WanVideoVAE(TOY_VAE), TOY_VAE)
    save_file(load_file(folder / "vae" / "model.safetensors"), folder / "vae" / "model.safetensors")
    for name, content in (("scheduler/scheduler_config.json", scheduler), ("vae/config.json", vae)):
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def shift_of(path: Path) -> object:
    pipe = WanVideoPipeline.from_pretrained(path, torch_dtype=torch.float32, device="cpu")
    return usual_values(pipe.parts)["sigma_shift"]


@pytest.mark.parametrize(("scheduler", "shift"), [(UNIPC, 3.0), (EULER, 7.0)], ids=["unipc", "euler"])
@pytest.mark.parametrize("place", [".", "transformer", "transformer/model.safetensors"])
def test_the_scheduler_of_a_repository_says_the_shift_of_its_calls(
    scheduler: object, shift: float, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    assert shift_of(repository(tmp_path, scheduler) / place) == shift
    assert f"sigma_shift is {shift:g} where a call gives none" in caplog.text


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        pytest.param({**EULER, "use_dynamic_shifting": True}, "", id="by-the-size-of-each-video"),
        pytest.param({"_class_name": "DDIMScheduler"}, "", id="no-shift"),
        pytest.param('{"flow_shift": NaN}', "flow_shift .* was left aside: it is nan", id="nan"),
        pytest.param({"flow_shift": -1}, "it is -1, and a shift is a number above 0", id="below-zero"),
        pytest.param({"flow_shift": "3"}, "it is '3'", id="text"),
        pytest.param("{", "was left aside: it is no JSON object", id="no-json"),
    ],
)
def test_a_scheduler_without_a_usable_shift_changes_nothing(
    scheduler: object, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    assert shift_of(repository(tmp_path, scheduler)) == 5.0
    assert re.search(said, caplog.text)


def test_what_the_file_itself_says_comes_before_its_repository(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    repository(tmp_path, UNIPC)
    write_toy_dit(tmp_path / "transformer" / "model.safetensors", sigma_shift=9.0)
    assert shift_of(tmp_path) == 9.0
    assert "scheduler" not in caplog.text


def load_vae(path: Path) -> WanVideoVAE:
    vae = ModelManager(torch.float32, "cpu").load_models([path]).fetch_model("wan_video_vae")
    assert isinstance(vae, WanVideoVAE)
    return vae


@pytest.mark.parametrize("place", ["vae", "vae/model.safetensors"])
def test_latents_are_normalised_with_the_statistics_of_the_repository(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    plain = load_vae(repository(tmp_path / "plain") / "vae")
    vae = load_vae(repository(tmp_path, vae={"z_dim": 16, "latents_mean": MEAN, "latents_std": STD}) / place)
    assert "normalised with the latents_mean and latents_std" in caplog.text
    video = torch.randn(1, 3, 1, 16, 16).clamp(-1, 1)
    raw = plain.encode(video, normalise=False)
    mean, std = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in (MEAN, STD))
    torch.testing.assert_close(vae.encode(video), (raw - mean) / std)
    torch.testing.assert_close(vae.decode((raw - mean) / std), plain.decode(raw, normalise=False))
    assert (plain.latent_mean, plain.latent_std) == (LATENT_MEAN, LATENT_STD)


def test_samples_of_other_statistics_are_other_samples() -> None:
    weights = WanVideoVAE(VAEConfig(dim=8)).state_dict()
    found = []
    for std in (LATENT_STD, tuple(STD)):
        vae = WanVideoVAE(VAEConfig(dim=8, latents_std=std))
        vae.load_state_dict(weights)
        found.append(fingerprint(vae))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "row", [[1.0] * 15, [0.0] * 16, [1.0] * 15 + [float("nan")], ["1"] * 16, 2.0], ids=str
)
def test_statistics_that_cannot_be_are_refused(row: object, tmp_path: Path) -> None:
    folder = repository(tmp_path, vae={"latents_mean": MEAN, "latents_std": row})
    with pytest.raises(ConfigurationError, match=r"latents_std is .*16 numbers"):
        load_vae(folder / "vae")

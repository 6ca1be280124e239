"""TI2V-5B: sizes by its VAE's stride, its defaults, and the first frame that stays clean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsynth.errors import ArgumentError, MissingModelError, UnusedInputError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.request import usual_values
from diffsynth.pipelines.saved_latents import read_latents
from diffsynth.pipelines.wan_video import WanVideoPipeline

TEXT: dict[str, Any] = {"prompt_embeds": torch.ones(1, 4, 32), "cfg_scale": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def files() -> list[str]:
    return toy_files("ti2v")


@pytest.fixture(scope="module")
def pipe(files: list[str]) -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")


def picture(width: int = 64, height: int = 32) -> Image.Image:
    drawn = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", [drawn, drawn.transpose(Image.Transpose.FLIP_TOP_BOTTOM), drawn])


def latents(pipe: WanVideoPipeline, **arguments: Any) -> Tensor:
    made = pipe(**{**TEXT, "output_type": "latent", **arguments})
    assert isinstance(made, Tensor)
    return made


def test_defaults_are_the_official_ones(pipe: WanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.parts, "generation", {})
    found = usual_values(pipe.parts)
    assert (found["width"], found["height"], found["num_frames"], found["fps"]) == (1280, 704, 121, 24)
    assert (found["num_inference_steps"], found["cfg_scale"], found["sigma_shift"]) == (50, 5.0, 5.0)
    assert found["sampler"] == "unipc"


def test_sizes_are_multiples_of_32_with_and_without_the_vae(pipe: WanVideoPipeline, files: list[str]) -> None:
    without = WanVideoPipeline.from_model_manager(
        ModelManager(torch_dtype=torch.float32, device="cpu").load_models(
            [f for f in files if "vae" not in f]
        )
    )
    for one in (pipe, without):
        assert latents(one, height=40, width=64).shape == (1, 48, 2, 4, 4)
        with pytest.raises(ArgumentError, match="height is 48, not a multiple of 32"):
            one(**TEXT, height=48, strict=True)
    with pytest.raises(MissingModelError, match=r"load Wan2\.2_VAE\.pth"):
        without(**TEXT)
    with pytest.raises(MissingModelError, match=r"input_image needs the VAE; load it \(Wan2\.2_VAE\.pth\)"):
        latents(without, input_image=picture())


def test_the_first_latent_is_that_of_the_picture_in_every_video(pipe: WanVideoPipeline) -> None:
    seen: list[Tensor] = []

    def keep(_: object, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"][:, :, :1])

    made = latents(pipe, input_image=picture(), num_videos_per_prompt=2, callback_on_step_end=keep)
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None, :, None]
    assert pipe.parts.vae is not None
    with torch.no_grad():
        first = pipe.parts.vae.encode(pixels / 127.5 - 1)
    for one in (*seen, made[:, :, :1]):
        # 8 bits became float32 by another order of operations
        torch.testing.assert_close(one, first.expand(2, -1, -1, -1, -1), atol=1e-5, rtol=1e-5)
    assert len(seen) == 2 and not torch.equal(made[0, :, 1:], made[1, :, 1:])


def test_the_area_gives_the_size_that_comes_nearest(pipe: WanVideoPipeline) -> None:
    assert latents(pipe, input_image=picture(100, 70), max_area=6200).shape[3:] == (4, 6)


def test_a_picture_goes_with_a_video_to_start_from(pipe: WanVideoPipeline) -> None:
    video = torch.rand(5, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    plain = latents(pipe, input_video=video, denoising_strength=0.5)
    both = latents(pipe, input_video=video, denoising_strength=0.5, input_image=picture())
    assert not torch.equal(plain[:, :, 1:], both[:, :, 1:])


def test_what_it_cannot_use_is_refused(pipe: WanVideoPipeline) -> None:
    with pytest.raises(UnusedInputError, match="no plane that says which frames are given"):
        latents(pipe, input_image=picture(), end_image=picture())
    with pytest.raises(ArgumentError, match="nothing is left to make; give 5 or more"):
        latents(pipe, input_image=picture(), num_frames=1)
    assert latents(pipe, num_frames=1).shape[2] == 1


def test_saved_latents_are_decoded_as_the_call_would(pipe: WanVideoPipeline, tmp_path: Path) -> None:
    file = tmp_path / "video.latents.safetensors"
    frames = pipe(**TEXT, output_type="pt", save_latents=file)
    saved = read_latents(file)
    assert frames.shape == (1, 5, 3, 32, 64) and saved.vae is not None  # type: ignore[union-attr]
    assert torch.equal(pipe.decode(saved.latents, output_type="pt"), frames)  # type: ignore[arg-type]
    tiled = pipe.decode(saved.latents, output_type="pt", tiled=True, tile_size=(2, 2), tile_stride=(1, 1))
    assert tiled.shape == frames.shape  # type: ignore[union-attr]

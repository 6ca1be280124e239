"""Which of the loaded networks a pipeline takes, and what it says when it cannot know."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth.errors import (
    AmbiguousModelError,
    ArgumentError,
    ConfigurationError,
    MissingModelError,
    TokenizerNotFoundError,
)
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.text_encoder import WanTextEncoder
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.toys import TOY_DIT, TOY_TEXT_ENCODER, write_toy, write_toy_dit

Make = Callable[..., WanVideoPipeline]


def pipeline(*files: Path, **arguments: object) -> WanVideoPipeline:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(list(files))
    return WanVideoPipeline.from_model_manager(manager, **arguments)


def test_two_equal_dits_are_experts_in_their_order_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (
        write_toy_dit(tmp_path / name / "dit.safetensors", seed) for seed, name in enumerate("ab")
    )
    with caplog.at_level(logging.WARNING, "diffsynth"):
        pipe = pipeline(first, second)
    assert pipe.parts.sources["dit"] == str(first) and pipe.parts.sources["dit_low_noise"] == str(second)
    assert "the first is taken for high noise" in caplog.text and "dit=[HIGH, LOW]" in caplog.text


def test_paths_tell_the_role_whatever_the_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    low = write_toy_dit(tmp_path / "low_noise_model" / "dit.safetensors")
    high = write_toy_dit(tmp_path / "high_noise_model" / "dit.safetensors")
    pipe = pipeline(low, high)
    assert pipe.parts.sources["dit"] == str(high) and pipe.parts.boundary == 0.875
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_two_experts_of_one_role_are_no_pair(tmp_path: Path) -> None:
    files = [write_toy_dit(tmp_path / f"high_noise_{n}.safetensors", n) for n in (1, 2)]
    with pytest.raises(AmbiguousModelError, match="high-noise experts; load one of each"):
        pipeline(*files)


def test_two_different_dits_are_both_named_with_the_call_that_picks(tmp_path: Path) -> None:
    first = write_toy_dit(tmp_path / "a.safetensors")
    second = write_toy_dit(tmp_path / "b.safetensors", config=replace(TOY_DIT, num_layers=3))
    with pytest.raises(AmbiguousModelError) as caught:
        pipeline(first, second)
    assert all(text in str(caught.value) for text in (str(first), str(second), "dit="))
    pipe = pipeline(first, second, dit=second)
    assert pipe.parts.sources["dit"] == str(second) and pipe.parts.low is None


def test_three_dits_are_named_and_two_can_be_picked(tmp_path: Path) -> None:
    files = [write_toy_dit(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("abc")]
    with pytest.raises(AmbiguousModelError) as caught:
        pipeline(*files)
    assert all(str(file) in str(caught.value) for file in files) and "dit=[HIGH, LOW]" in str(caught.value)
    pipe = pipeline(*files, dit=[files[2], files[0]])
    assert [pipe.parts.sources[part] for part in ("dit", "dit_low_noise")] == [str(files[2]), str(files[0])]
    with pytest.raises(AmbiguousModelError, match="names 0 of the loaded DiTs; loaded: "):
        pipeline(*files, dit=tmp_path / "d.safetensors")


def test_a_text_encoder_without_tokenizer_says_where_it_looked(tmp_path: Path, toy_folder: Path) -> None:
    file = tmp_path / "t5.safetensors"
    file.write_bytes((toy_folder / "t5.safetensors").read_bytes())
    with pytest.raises(TokenizerNotFoundError) as caught:
        pipeline(file)
    for text in (str(tmp_path / "google" / "umt5-xxl" / "spiece.model"), "tokenizer.json", "tokenizer_path="):
        assert text in str(caught.value), text
    for place in (
        toy_folder,
        toy_folder / "google" / "umt5-xxl",
        toy_folder / "google/umt5-xxl/spiece.model",
    ):
        assert pipeline(file, tokenizer_path=place).parts.tokenizer is not None
    with pytest.raises(TokenizerNotFoundError, match="nowhere"):
        pipeline(file, tokenizer_path=tmp_path / "nowhere")


def test_a_text_encoder_of_another_width_is_told(tmp_path: Path, toy_folder: Path) -> None:
    config = replace(TOY_TEXT_ENCODER, dim=48)
    file = write_toy(tmp_path / "t5.safetensors", WanTextEncoder(config), config)
    with pytest.raises(ConfigurationError, match=r"features 48 wide and the DiT .* reads 32"):
        pipeline(file, toy_folder / "dit.safetensors", tokenizer_path=toy_folder)


def test_two_vaes_are_too_many(tmp_path: Path, toy_folder: Path) -> None:
    copy = tmp_path / "vae2.safetensors"
    copy.write_bytes((toy_folder / "vae.safetensors").read_bytes())
    with pytest.raises(AmbiguousModelError, match=r"2 networks are wan_video_vae: .*vae2\.safetensors"):
        pipeline(toy_folder / "vae.safetensors", copy)


def test_what_is_missing_is_said_when_it_is_needed(toy_folder: Path) -> None:
    dit, vae = toy_folder / "dit.safetensors", toy_folder / "vae.safetensors"
    rows = torch.zeros(1, 4, 32)
    with pytest.raises(MissingModelError, match=r"No text encoder is loaded; .* prompt_embeds="):
        pipeline(dit, vae)("a")
    with pytest.raises(MissingModelError, match=r"negative_prompt_embeds= .or cfg_scale=1"):
        pipeline(dit, vae)(prompt_embeds=rows)
    with pytest.raises(MissingModelError, match=r"No VAE is loaded; .* output_type='latent'"):
        pipeline(dit)(prompt_embeds=rows, cfg_scale=1)
    with pytest.raises(MissingModelError, match="input_video needs the VAE"):
        pipeline(dit)(prompt_embeds=rows, cfg_scale=1, input_video=torch.zeros(5, 3, 16, 32))
    with pytest.raises(MissingModelError, match="No DiT is loaded"):
        pipeline(vae)(prompt_embeds=rows, cfg_scale=1)
    latents = pipeline(dit)(prompt_embeds=rows, cfg_scale=1, output_type="latent", seed=0)
    assert latents.shape == (1, 16, 2, 2, 4)


def test_wrong_ways_to_make_a_pipeline(toy_folder: Path) -> None:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(toy_folder)
    with pytest.raises(ArgumentError, match="use_usp=True"):
        WanVideoPipeline.from_model_manager(manager, use_usp=True)
    with pytest.raises(ArgumentError, match="precision is 'v2'; known: 'official', 'v1'"):
        WanVideoPipeline.from_model_manager(manager, precision="v2")
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="no usable CUDA GPU; give device='cpu'"):
            WanVideoPipeline.from_model_manager(manager, device="cuda")
    with pytest.raises(ArgumentError, match=r"Wan-AI/Wan2.1-T2V-1.3B' is no file or folder .* download=True"):
        WanVideoPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B", device="cpu")


def test_a_missing_file_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(FileNotFoundError, match=r"weights/dit\.safetensors"):
        WanVideoPipeline.from_pretrained("weights/dit.safetensors", device="cpu")

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
from tests.vace_toys import write_vace

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


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "Wan2_2-T2V-A14B-LOW_bf16.safetensors"),
        ("wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors", "wan2.2_i2v_A14b_low_noise_x.safetensors"),
        ("Wan2.2-T2V-A14B-HighNoise-bf16.safetensors", "Wan2.2-T2V-A14B-LowNoise-bf16.safetensors"),
        ("high_noise_model/model.safetensors", "low_noise_model/model.safetensors"),
        ("transformer/model.safetensors", "transformer_2/model.safetensors"),
        ("distill_models/high_noise_model.safetensors", "distill_models/low_noise_model.safetensors"),
    ],
)
def test_names_of_every_release_tell_the_role(high: str, low: str, tmp_path: Path) -> None:
    files = [write_toy_dit(tmp_path / name, seed) for seed, name in enumerate((low, high))]
    pipe = pipeline(*files)
    assert [pipe.parts.sources[part] for part in ("dit", "dit_low_noise")] == [str(files[1]), str(files[0])]


@pytest.mark.parametrize("name", ["high_quality", "t2v_low_vram", "highres", "slow", "high_noise_mix_low"])
def test_other_words_tell_no_role(name: str, tmp_path: Path) -> None:
    from diffsynth.checkpoints.hints import role_of

    assert role_of((tmp_path / f"{name}.safetensors",), {}) is None
    assert role_of((tmp_path / f"{name}_low_noise.safetensors",), {}) == (None if "mix" in name else "low")


def test_the_caller_tells_the_roles_also_against_the_paths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (write_toy_dit(tmp_path / name / "dit.safetensors", seed) for seed, name in enumerate("ab"))
    pipe = pipeline(a, b, dit=[b, a])
    assert pipe.parts.sources["dit"] == str(b) and not caplog.records
    high = write_toy_dit(tmp_path / "high_noise_model" / "dit.safetensors")
    low = write_toy_dit(tmp_path / "low_noise_model" / "dit.safetensors", 1)
    assert pipeline(high, low, dit=[low, high]).parts.sources["dit"] == str(low)
    assert "the paths say the opposite" in caplog.text


def test_swapped_experts_make_the_video_of_the_other_order(tmp_path: Path, toy_folder: Path) -> None:
    a, b = (write_toy_dit(tmp_path / name / "dit.safetensors", seed) for seed, name in enumerate("ab"))
    arguments = {"prompt_embeds": torch.ones(1, 4, 32), "cfg_scale": 1.0, "seed": 0, "output_type": "latent"}
    steps = {"sigmas": [1.0, 0.8, 0.4]}
    one, other = pipeline(a, b), pipeline(a, b, dit=[b, a])
    expected = other(**arguments, **steps)
    assert not torch.equal(one(**arguments, **steps), expected)
    one.enable_vram_management(num_persistent_param_in_dit=0)
    one.swap_experts()
    assert one.memory_plan is not None, "the limits hold again"
    assert torch.equal(one(**arguments, **steps), expected)
    assert one.parts.sources["dit"] == str(b) and one.dit is not None
    one.swap_experts()
    one.disable_vram_management()
    assert not torch.equal(one(**arguments, **steps), expected)
    with pytest.raises(ArgumentError, match="has not two"):
        pipeline(a).swap_experts()


def test_text_and_picture_experts_are_no_pair(tmp_path: Path) -> None:
    text = write_toy_dit(tmp_path / "high_noise_model" / "dit.safetensors")
    wide = replace(TOY_DIT, in_dim=36)
    picture = write_toy_dit(tmp_path / "low_noise_model" / "dit.safetensors", config=wide)
    with pytest.raises(AmbiguousModelError) as caught:
        pipeline(text, picture)
    for words in (f"{text}: t2v, in_dim 16", f"{picture}: i2v, in_dim 36", "no pair of experts"):
        assert words in str(caught.value)
    vace = write_vace(tmp_path / "vace_low_noise" / "model.safetensors")
    with pytest.raises(AmbiguousModelError, match=r"t2v, alone\n.*vace, wan_video_vace"):
        pipeline(text, vace)


@pytest.mark.parametrize(
    ("in_dim", "told", "boundary"),
    [
        (16, {}, 0.875),
        (36, {}, 0.9),
        (52, {}, 0.875),
        (16, {"boundary": 0.8}, 0.8),
        (36, {"boundary": 0}, 0.0),
    ],
)
def test_the_boundary_is_the_checkpoints_else_that_of_its_inputs(
    in_dim: int, told: dict[str, float], boundary: float, tmp_path: Path
) -> None:
    config = replace(TOY_DIT, in_dim=in_dim)
    high = write_toy_dit(tmp_path / "high_noise_model" / "dit.safetensors", 1, config, **told)
    low = write_toy_dit(tmp_path / "low_noise_model" / "dit.safetensors", 2, config)
    assert pipeline(high, low).parts.boundary == boundary
    assert pipeline(low, high).parts.boundary == boundary


def test_diffusers_tells_the_boundary_in_its_index(tmp_path: Path) -> None:
    folders = ("transformer_2", "transformer")
    files = [write_toy_dit(tmp_path / f / "model.safetensors", seed) for seed, f in enumerate(folders)]
    (tmp_path / "model_index.json").write_text('{"boundary_ratio": 0.85, "transformer_2": ["a", "b"]}')
    pipe = pipeline(*files)
    assert pipe.parts.boundary == 0.85 and pipe.parts.sources["dit"] == str(files[1])


def test_a_boundary_that_is_no_share_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="boundary is 875"):
        pipeline(write_toy_dit(tmp_path / "dit.safetensors", boundary=875))


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
        with pytest.raises(ArgumentError, match="torch finds no GPU; give cpu"):
            WanVideoPipeline.from_model_manager(manager, device="cuda")
    with pytest.raises(ArgumentError, match=r"Wan-AI/Wan2.1-T2V-1.3B' is no file or folder .* download=True"):
        WanVideoPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B", device="cpu")


def test_a_missing_file_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(FileNotFoundError, match=r"weights/dit\.safetensors"):
        WanVideoPipeline.from_pretrained("weights/dit.safetensors", device="cpu")

"""What a model does not read is an error, and what a call changes or lacks is a line."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth.checkpoints.hints import tells_few_steps
from diffsynth.errors import ArgumentError, UnusedInputError
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline

SMALL = {"seed": 0, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipes() -> dict[str, WanVideoPipeline]:
    return {
        kind: WanVideoPipeline.from_pretrained(toy_files(kind), torch_dtype=torch.float32, device="cpu")
        for kind in ("i2v", "vace", "reference", "control")
    }


@pytest.mark.parametrize(
    "given", [{"cfg_scale_low_noise": 2.0}, {"switch_DiT_boundary": 0.9}], ids=lambda given: next(iter(given))
)
def test_arguments_of_two_experts_are_refused_with_one_dit(
    given: dict[str, float], toy_pipe: WanVideoPipeline, two_experts: WanVideoPipeline
) -> None:
    with pytest.raises(UnusedInputError, match=rf"{next(iter(given))} is .*, and one DiT is loaded"):
        toy_pipe("x", **SMALL, **given)
    assert two_experts("x", **SMALL, **given) is not None
    assert toy_pipe("x", cfg_scale=2.0, cfg_scale_low_noise=2.0, **SMALL) is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seed": 10**23}, "seed is 10+; give 0 to 18446744073709551615, or -1 to draw one"),
        ({"seed": 2**64 - 1, "num_videos_per_prompt": 2}, "give 0 to 18446744073709551614"),
        ({"seed": -2}, "seed is -2"),
        ({"seed": True}, "seed is True"),
        ({"sigma_shift": float("nan")}, "sigma_shift is nan"),
        ({"sigma_shift": float("inf")}, "sigma_shift is inf"),
        ({"sigma_shift": "5"}, "sigma_shift is 5; give a number"),
        ({"num_inference_steps": 10**9}, "num_inference_steps is 1000000000; .* to 10000"),
        ({"num_frames": 10**9 + 1}, "num_frames is 1000000001; Wan models know positions up to 4093"),
        ({"height": 10**9}, "height is 1000000000; Wan models know positions up to 16384"),
        ({"num_videos_per_prompt": 2.5}, "num_videos_per_prompt is 2.5; give a whole number"),
        ({"num_videos_per_prompt": 10**9}, "num_videos_per_prompt is 1000000000"),
        ({"cfg_scale": True}, "cfg_scale is True; give a number"),
        ({"switch_DiT_boundary": float("nan")}, "switch_DiT_boundary is nan"),
        ({"denoising_strength": "0.5"}, "denoising_strength is 0.5; give a number"),
        ({"latents": [1.0]}, "latents is a list; give a torch.Tensor"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 3; give a function"),
        ({"prompt": None, "prompt_embeds": [[1.0]]}, "prompt_embeds is a list; give a torch.Tensor"),
        (
            {"prompt": None, "prompt_embeds": torch.ones(1, 4, 32, dtype=torch.int64)},
            "prompt_embeds is a torch.int64",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_types_that_cannot_be_are_refused(
    given: dict[str, Any], words: str, toy_pipe: WanVideoPipeline
) -> None:
    with pytest.raises(ArgumentError, match=words):
        toy_pipe(**{"prompt": "x", **given})


def test_seeds_of_64_bits_make_a_video(toy_pipe: WanVideoPipeline) -> None:
    assert toy_pipe("x", seed=2**64 - 1, output_type="latent") is not None


def test_the_seed_minus_one_is_drawn_and_told(
    toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    made = [toy_pipe("x", seed=-1, output_type="latent") for _ in range(2)]
    assert not torch.equal(*made)  # type: ignore[arg-type]
    assert f"seed={toy_pipe.last_settings['seed']} was drawn" in caplog.text
    noise = torch.zeros(1, 16, 2, 2, 4)
    assert toy_pipe("x", seed=-1, latents=noise, output_type="latent") is not None


def test_a_text_to_video_model_describes_the_inputs_that_it_reads(
    toy_pipe: WanVideoPipeline, pipes: dict[str, WanVideoPipeline]
) -> None:
    assert "\n  inputs: text, video\n" in f"{toy_pipe.describe()}\n"
    assert "\n  inputs: image, image_tokens, text, video\n" in f"{pipes['i2v'].describe()}\n"


def test_a_last_frame_alone_is_refused_by_what_the_model_reads(
    toy_pipe: WanVideoPipeline, pipes: dict[str, WanVideoPipeline]
) -> None:
    picture = Image.new("RGB", (48, 32))
    with pytest.raises(UnusedInputError, match=r"end_image was given, .* has no plane .*; FLF2V"):
        toy_pipe("x", end_image=picture)
    with pytest.raises(ArgumentError, match="end_image was given without input_image; give both"):
        pipes["i2v"]("x", end_image=picture)


# pictures that v1 stretched


def test_v1_stretches_pictures_and_otherwise_a_line_tells_what_was_cut(
    pipes: dict[str, WanVideoPipeline], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    wide = Image.linear_gradient("L").rotate(90).resize((96, 32)).convert("RGB")
    given = {"input_image": wide, "tiled": False, **SMALL}
    cover = pipes["i2v"]("x", **given)
    assert caplog.text.count("input_image of 96x32 was cropped in the middle and resized to 48x32") == 1
    assert "resize='contain' or 'stretch' keeps all of it, and max_area= its proportions" in caplog.text
    v1 = WanVideoPipeline(pipes["i2v"].parts, "v1")
    stretched = pipes["i2v"]("x", resize="stretch", **given)
    assert torch.equal(v1("x", **given), stretched) and not torch.equal(stretched, cover)  # type: ignore[arg-type]
    assert torch.equal(v1("x", resize="cover", **given), cover)  # type: ignore[arg-type]
    caplog.clear()
    pipes["i2v"]("x", **{**given, "input_image": wide.resize((99, 66))})  # the same proportions
    assert "resize=" not in caplog.text


def test_a_reference_picture_is_brought_to_size_as_the_call_says(
    pipes: dict[str, WanVideoPipeline],
) -> None:
    wide = Image.linear_gradient("L").rotate(90).resize((96, 32)).convert("RGB")
    given = {"control_video": torch.zeros(5, 3, 32, 48), "reference_image": wide, **SMALL}
    made = [pipes["reference"]("x", resize=how, **given) for how in ("cover", "stretch")]
    assert not torch.equal(*made)  # type: ignore[arg-type]


# videos of another length


def test_fit_serves_the_input_video_too(toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    frames = torch.rand(3, 3, 16, 32)
    given = {"denoising_strength": 0.5, **SMALL}
    held = toy_pipe("x", input_video=frames, fit="hold", **given)
    longer = torch.cat([frames, frames[-1:], frames[-1:]])
    assert torch.equal(held, toy_pipe("x", input_video=longer, **given))  # type: ignore[arg-type]
    assert "input_video has 3 frames and 5 are made: fit='hold'" in caplog.text
    trimmed = toy_pipe("x", input_video=torch.cat([longer, frames]), **given)
    assert torch.equal(trimmed, held)  # type: ignore[arg-type]
    assert "input_video has 8 frames and 5 are made: fit='trim'" in caplog.text


# lines


def test_a_prompt_beyond_the_limit_says_once_how_much_is_cut_and_where(
    toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = toy_pipe.parts.tokenizer
    assert tokenizer is not None
    words = ["a"] * 600
    total = len(tokenizer._vocabulary.encode(" ".join(words)))
    for _ in range(2):
        toy_pipe(" ".join(words), **SMALL)
    (line,) = [line for line in caplog.messages if "not read" in line]
    assert line.startswith(f"The last {total - 511} tokens of a prompt are not read: Wan reads 512.")
    caplog.clear()
    toy_pipe(" ".join(words[:200]), **SMALL)
    assert "not read" not in caplog.text


@pytest.mark.parametrize("prompt", ["", "  ", ["a", ""]])
def test_an_empty_prompt_is_said(
    prompt: Any, toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    toy_pipe(prompt, **SMALL)
    assert "The prompt is empty" in caplog.text


def test_a_negative_prompt_without_guidance_and_tiles_that_are_off_are_said(
    toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    toy_pipe("x", "blurry", cfg_scale=1.0, tiled=False, tile_size=(2, 2), **SMALL)
    assert "negative_prompt is not read: cfg_scale is 1" in caplog.text
    assert "tile_size and tile_stride are not read: tiled is False" in caplog.text


def test_a_vace_scale_beyond_the_usual_is_said(
    pipes: dict[str, WanVideoPipeline], caplog: pytest.LogCaptureFixture
) -> None:
    video = torch.zeros(5, 3, 32, 48)
    pipes["vace"]("x", vace_video=video, vace_scale=3, **SMALL)
    assert "vace_scale is 3; 0 (no effect) to 2 are usual" in caplog.text
    for wrong in (11, "2", None, float("nan"), [1.0, None]):
        if wrong is not None:
            with pytest.raises(ArgumentError, match="vace_scale is"):
                pipes["vace"]("x", vace_video=video, vace_scale=wrong)


# the settings of a step-distilled model


def write_lora(path: Path) -> Path:
    layer = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    save_file({layer.format("A"): torch.ones(4, 48), layer.format("B"): torch.ones(48, 4)}, path)
    return path


def test_a_few_step_preset_wants_its_lora_or_a_distilled_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [Path(file) for file in toy_files("t2v")]
    call: dict[str, Any] = {"preset": "lightx2v-4step", "num_inference_steps": 1, **SMALL}
    warning = "nothing says that .*dit.safetensors is one: no LoRA is loaded"
    pipe = WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")
    pipe("x", **call)
    assert len([m for m in caplog.messages if "step-distilled" in m]) == 1
    assert re.search(warning, caplog.text)
    pipe.load_lora(write_lora(tmp_path / "a.safetensors"))
    caplog.clear()
    pipe("x", **call)
    assert "step-distilled" not in caplog.text
    pipe.disable_lora()
    pipe("x", **call)
    assert "step-distilled" in caplog.text
    caplog.clear()
    named = files[0].with_name("wan2.1_t2v_4step.safetensors")
    files[0].rename(named)
    pipe = WanVideoPipeline.from_pretrained([named, *files[1:]], torch_dtype=torch.float32, device="cpu")
    pipe("x", **call)
    assert "step-distilled" not in caplog.text


def test_each_expert_wants_the_lora_of_a_few_step_preset(
    two_experts: WanVideoPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_experts.load_lora(write_lora(tmp_path / "few_high_noise.safetensors"))
    try:
        two_experts("x", preset="wan2.2-lightning-4step", num_inference_steps=1, **SMALL)
    finally:
        two_experts.unload_lora()
    (line,) = [m for m in caplog.messages if "step-distilled" in m]
    assert "low_noise_model" in line and "high_noise_model" not in line


@pytest.mark.parametrize(
    ("name", "is_told"),
    [
        ("Wan2.1-T2V-14B-StepDistill-CfgDistill/distill_models/a.safetensors", True),
        ("wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors", True),
        ("self_forcing_dmd.pt", True), ("FastWan2.1-T2V-1.3B/model.safetensors", True),
        ("wan2.2-rapid-mega-aio-v10.safetensors", True), ("turbo/x.safetensors", True),
        ("Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors", False),
        ("run/checkpoints/step-12000.safetensors", False), ("epoch=4-step=8000.ckpt", False),
        ("my_style_14steps.safetensors", False),
    ],
)  # fmt: skip
def test_names_of_published_few_step_models_tell(name: str, is_told: bool) -> None:
    assert tells_few_steps((Path("/models") / name,), {}) is is_told

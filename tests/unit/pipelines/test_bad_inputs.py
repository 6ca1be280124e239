"""Every wrong call says what was wrong and what to do, and no network is asked before."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from diffsynth.errors import (
    ArgumentError,
    DiffSynthError,
    NotFiniteError,
    UnknownArgumentError,
    UnusedInputError,
)
from diffsynth.pipelines.foreign_arguments import UNREAD
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.pipelines.counting import calls_of

EMBEDS = torch.zeros(1, 4, 32)
VIDEO = torch.zeros(5, 3, 16, 32)

# arguments, class, words of the message
WRONG: list[tuple[dict[str, Any], type[DiffSynthError], str]] = [
    ({"prompt": None}, ArgumentError, "There is no prompt; give prompt="),
    ({"prompt": []}, ArgumentError, "prompt is an empty list"),
    ({"prompt": 5}, ArgumentError, "prompt is 5; give a text"),
    ({"prompt": ["a", None]}, ArgumentError, "give a text"),
    ({"prompt": "a", "negative_prompt": 3}, ArgumentError, "negative_prompt is 3; give a text"),
    ({"prompt": "a", "prompt_embeds": EMBEDS}, ArgumentError, "prompt and prompt_embeds are both given"),
    ({"prompt_embeds": EMBEDS[0]}, ArgumentError, r"prompt_embeds has shape \(4, 32\)"),
    (
        {"negative_prompt": "b", "negative_prompt_embeds": EMBEDS},
        ArgumentError,
        "negative_prompt and negative_prompt_embeds are both given",
    ),
    ({"negative_prompt_embeds": EMBEDS, "cfg_scale": 1}, ArgumentError, "not read when cfg_scale is 1"),
    ({"num_inference_steps": 0}, ArgumentError, "num_inference_steps is 0; give a whole number from 1"),
    ({"num_inference_steps": 2.5}, ArgumentError, "num_inference_steps is 2.5"),
    ({"sigma_shift": 0.0}, ArgumentError, "sigma_shift is 0.0"),
    ({"sampler": "heun"}, ArgumentError, "sampler is 'heun'; known: euler"),
    ({"cfg_scale": float("nan")}, ArgumentError, "cfg_scale is nan"),
    ({"cfg_scale": "high"}, ArgumentError, "cfg_scale is high"),
    ({"height": 0}, ArgumentError, "height is 0; give a number of pixels"),
    ({"width": 33.5}, ArgumentError, "width is 33.5"),
    ({"num_frames": 0}, ArgumentError, "num_frames is 0; give 4 k"),
    ({"height": 17, "strict": True}, ArgumentError, "height is 17, not a multiple of 16; the next is 32"),
    ({"num_frames": 6, "strict": True}, ArgumentError, "num_frames is 6, which is not 4 k .* nearest is 9"),
    ({"tile_size": (4,)}, ArgumentError, r"tile_size is \(4,\)"),
    ({"tile_size": (4, 4), "tile_stride": (5, 2)}, ArgumentError, "larger than tile_size"),
    ({"output_type": "gif"}, ArgumentError, "output_type is 'gif'; known: pil"),
    ({"seed": 1, "latents": torch.zeros(1, 16, 2, 2, 4)}, ArgumentError, "seed and latents are both given"),
    ({"latents": torch.zeros(1, 16, 3, 2, 4)}, ArgumentError, r"needs \(1, 16, 2, 2, 4\)"),
    ({"seed": "abc"}, ArgumentError, "seed is 'abc'; give a whole number"),
    ({"rand_device": "moon"}, ArgumentError, "rand_device is 'moon'"),
    ({"sigmas": [0.5, 0.9]}, ArgumentError, "do not fall"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": 2}, ArgumentError, "sigmas= replaces num_inference_steps"),
    ({"timesteps": [500]}, ArgumentError, "timesteps= was given without sigmas="),
    ({"switch_DiT_boundary": 875}, ArgumentError, "switch_DiT_boundary is 875; give a number from 0 to 1"),
    ({"denoising_strength": 0.5}, ArgumentError, "there is no input_video"),
    ({"denoising_strength": 0.0, "input_video": VIDEO}, ArgumentError, "denoising_strength is 0.0"),
    ({"denoising_strength": 1.5, "input_video": VIDEO}, ArgumentError, "denoising_strength is 1.5"),
    ({"negativ_prompt": "x"}, UnknownArgumentError, "no argument 'negativ_prompt'. Did you mean 'negative_p"),
    ({"steps": 4}, UnknownArgumentError, "no argument 'steps'. Did you mean 'timesteps'"),
    ({"zzz": 1}, UnknownArgumentError, "Known arguments: "),
    ({"input_image": VIDEO[0]}, UnusedInputError, "reads no picture; I2V-14B"),
    ({"vace_scale": 0.5}, UnusedInputError, "vace_scale was given, but .* VACE"),
    ({"motion_bucket_id": 50}, UnusedInputError, "speed-control"),
    ({"tea_cache_l1_thresh": 0.05}, UnusedInputError, "step cache"),
]


def _id(value: object) -> str:
    return " ".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("arguments", "kind", "words"), WRONG, ids=_id)
def test_wrong_calls_are_told_before_anything_runs(
    toy_pipe: WanVideoPipeline, arguments: dict[str, Any], kind: type[DiffSynthError], words: str
) -> None:
    has_text = "prompt" in arguments or "prompt_embeds" in arguments
    with (
        calls_of(toy_pipe.text_encoder, toy_pipe.dit) as calls,
        pytest.raises(kind, match=words) as caught,
    ):
        toy_pipe(**arguments, **({} if has_text else {"prompt": "a red circle"}))
    assert type(caught.value) is kind and calls == []


def test_values_that_ask_for_nothing_pass_in_silence(
    toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    plain = toy_pipe("x", seed=0)
    for choice in (0, -1):
        harmless = {name: unread.harmless[choice] for name, unread in UNREAD.items()}
        harmless |= {"vace_video": None, "vace_scale": 1.0, "cfg_merge": False, "output_type": "quantized"}
        assert toy_pipe("x", seed=0, progress_bar_st=None, **harmless) == plain
    lone = {"tea_cache_model_id": "Wan2.1-T2V-1.3B", "tea_cache_l1_thresh": 0.0, "audio_sample_rate": 16000}
    assert toy_pipe("x", seed=0, **lone) == plain
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tea_cache_l1_thresh": 0.05, "tea_cache_model_id": "Wan2.1-T2V-1.3B"}, "l1_thresh .* step cache"),
        ({"sliding_window_size": 9, "sliding_window_stride": 5}, "sliding windows"),
        ({"input_audio": np.zeros(16000), "audio_sample_rate": 16000}, "input_audio .* Wan2.2-S2V-14B"),
        ({"motion_video": VIDEO}, "motion_video .* Wan2.2-S2V-14B"),
        ({"animate_pose_video": VIDEO}, "animate_pose_video .* Wan2.2-Animate-14B"),
        ({"vap_video": VIDEO}, "vap_video .* Video-As-Prompt"),
        ({"longcat_video": VIDEO}, "longcat_video .* LongCat-Video"),
        ({"framewise_decoding": True}, "Wan-Dancer"),
    ],
    ids=_id,
)
def test_what_is_not_built_stops_with_its_name(
    toy_pipe: WanVideoPipeline, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnusedInputError, match=words):
        toy_pipe("x", **arguments)


def test_cfg_merge_changes_nothing(toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diffsynth")
    assert toy_pipe("x", seed=0, cfg_merge=True) == toy_pipe("x", seed=0)
    assert any("cfg_merge" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("asked", "made", "words"),
    [
        ({"height": 17, "width": 40}, (32, 48), "height 17 is not a multiple of 16; 32 is made instead"),
        ({"height": 16, "width": 33}, (16, 48), "width 33 is not a multiple of 16; 48 is made instead"),
    ],
)
def test_sizes_are_snapped_up_with_a_warning(
    toy_pipe: WanVideoPipeline,
    caplog: pytest.LogCaptureFixture,
    asked: dict[str, int],
    made: tuple[int, int],
    words: str,
) -> None:
    with caplog.at_level(logging.WARNING, "diffsynth"):
        video = toy_pipe("x", num_frames=1, seed=0, output_type="pt", **asked)
    assert tuple(video.shape[-2:]) == made and words in caplog.text


@pytest.mark.parametrize(("asked", "made"), [(2, 5), (3, 5), (4, 5), (6, 9), (8, 9), (9, 9)])
def test_frames_are_snapped_as_v1_did(
    toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture, asked: int, made: int
) -> None:
    with caplog.at_level(logging.WARNING, "diffsynth"):
        latents = toy_pipe("x", num_frames=asked, seed=0, output_type="latent")
    assert latents.shape[2] == (made - 1) // 4 + 1
    assert (f"{made} are made instead" in caplog.text) == (asked != made)


def test_nan_stops_the_run_and_names_the_step(toy_pipe: WanVideoPipeline) -> None:
    noise = torch.zeros(1, 16, 2, 2, 4)
    noise[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="not finite after step 1 of 3"):
        toy_pipe("x", latents=noise, num_inference_steps=3)

    def spoil(_: object, step: int, __: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": tensors["latents"] * (torch.inf if step == 1 else 1.0)}

    with pytest.raises(NotFiniteError, match=r"after step 3 of 4 .*bfloat16"):
        toy_pipe("x", seed=0, num_inference_steps=4, callback_on_step_end=spoil)


def test_text_features_of_another_width_are_told(toy_pipe: WanVideoPipeline) -> None:
    with pytest.raises(ArgumentError, match="features are 48 wide; this DiT reads 32"):
        toy_pipe(prompt_embeds=torch.zeros(1, 4, 48), cfg_scale=1.0)


def test_an_ignored_input_video_is_said(toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "diffsynth"):
        toy_pipe("x", input_video=VIDEO, seed=0, output_type="latent")
    assert "denoising_strength is 1: nothing of input_video is kept" in caplog.text

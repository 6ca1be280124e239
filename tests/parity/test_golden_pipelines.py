"""Whole generations equal the reference pipelines, asked through `pipe(...)`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden import Case, case
from tests.toys import golden_pipeline


def _check_frames(golden: Case, video: torch.Tensor) -> None:
    # The reference truncates to 8 bits; (B, F, 3, H, W) -> (3, F, H, W).
    golden.assert_close("frames_u8", (video[0].transpose(0, 1).double() * 255).clamp(0, 255).to(torch.uint8))


def _text(golden: Case) -> dict[str, torch.Tensor]:
    context, negative = golden.inputs["context"], golden.inputs.get("context_null")
    whole = {"prompt_embeds": context if context.ndim == 3 else context[None]}
    if negative is not None:
        whole["negative_prompt_embeds"] = negative if negative.ndim == 3 else negative[None]
    return whole


@pytest.mark.parametrize("name", ["I_t2v_wan21_unipc", "I_t2v_wan21_dpmpp", "I_t2v_wan22_A14B"])
def test_official_text_to_video(name: str, tmp_path: Path) -> None:
    golden, config = case(name), case(name).config
    pipe = golden_pipeline(golden, tmp_path)
    width, height = config["size_wh"]
    scales = config.get("guide_scale_low_high") or config["guide_scale"]
    low, high = scales if isinstance(scales, list) else (scales, scales)
    arguments = dict(
        **_text(golden), latents=golden.inputs["noise"][None], height=height, width=width,
        num_frames=config["frame_num"], sampler=config["solver"], num_inference_steps=config["steps"],
        sigma_shift=config["shift"], cfg_scale=high, cfg_scale_low_noise=low,
    )  # fmt: skip
    golden.assert_close("latents", pipe(**arguments, output_type="latent")[0])
    video = pipe(**arguments, output_type="pt")
    _check_frames(golden, video)
    if "video" in golden.outputs:
        golden.assert_close("video", (video[0].transpose(0, 1) * 2 - 1))


@pytest.mark.parametrize(
    "name", ["I_diffsynth_t2v_euler", "I_diffsynth_t2v_euler_cfg1_tiled", "I_diffsynth_v2v_strength0.7"]
)
def test_diffsynth_v1_generation(name: str, tmp_path: Path) -> None:
    golden, config = case(name), case(name).config
    pipe = golden_pipeline(golden, tmp_path)
    arguments = dict(
        **_text(golden), latents=golden.inputs["noise"], height=config["height"], width=config["width"],
        num_frames=config["frames"], num_inference_steps=config["steps"], sigma_shift=config["shift"],
        cfg_scale=config["cfg_scale"], denoising_strength=config["denoising_strength"], tiled=config["tiled"],
        tile_size=tuple(config["tile_size"]), tile_stride=tuple(config["tile_stride"]),
    )  # fmt: skip
    if config["cfg_scale"] == 1.0:
        arguments.pop("negative_prompt_embeds", None)
    frames = [
        v
        for k, v in {**golden.inputs, **golden.outputs}.items()
        if v.dtype == torch.uint8 and k != "frames_u8"
    ]
    if frames:
        video = frames[0] if frames[0].shape[-1] == 3 else frames[0].permute(1, 2, 3, 0)
        arguments["input_video"] = video.permute(0, 3, 1, 2).float() / 255
    golden.assert_close("latents", pipe(**arguments, output_type="latent"))
    _check_frames(golden, pipe(**arguments, output_type="pt"))

"""TI2V-5B and its VAE equal the reference implementations, loaded as users load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.wan.vae22 import LATENT_MEAN, LATENT_STD
from tests.golden import case, names
from tests.toys import golden_pipeline, load_golden_model


@pytest.mark.parametrize("name", names("E_vae22_"))
@pytest.mark.parametrize("chunk", [1, 2, 4], ids=lambda c: f"{c}-latents-a-chunk")
def test_vae_equals_the_reference_whatever_the_chunk(name: str, chunk: int, tmp_path: Path) -> None:
    golden = case(name)
    vae = load_golden_model(golden, "vae", golden.config, tmp_path, "wan_video_vae")
    [video] = [v for k, v in golden.inputs.items() if k.startswith("video")]
    [latents] = [v for k, v in golden.inputs.items() if k.startswith("latent")]
    with torch.no_grad():
        golden.assert_close("encoded", vae.encode(video.clamp(-1, 1), chunk_frames=4 * chunk))
        golden.assert_close("decoded", vae.decode(latents, chunk_latents=chunk))


def test_normalisation_constants_are_the_official_ones() -> None:
    golden = case("E_vae_normalisation_constants")
    golden.assert_close("mean22", torch.tensor(LATENT_MEAN))
    golden.assert_close("inv_std22", 1 / torch.tensor(LATENT_STD))


def test_velocity_with_times_by_frame_and_by_token_equals_the_reference(tmp_path: Path) -> None:
    golden = case("A_ti2v_wan22_per_token_timesteps")
    dit = load_golden_model(golden, "model", golden.config, tmp_path, "wan_video_dit")
    latents, text = golden.inputs["x12"][None], golden.inputs["context12"][None]
    num_frames, num_tokens = latents.shape[2], golden.arguments["seq_len_ramp"]
    by_frame = torch.full((1, num_frames), golden.arguments["T"], dtype=torch.float64)
    by_frame[:, 0] = 0.0
    by_token = by_frame.repeat_interleave(num_tokens // num_frames, dim=1)
    ramp = torch.linspace(0, 999, num_tokens)[None]
    branch = dit.prepare(Conditions(text=text))
    with torch.no_grad():
        for output, timestep in (
            ("out_first_frame_zero", by_frame),
            ("out_first_frame_zero", by_token),
            ("out_ramp", ramp),
        ):
            [velocity] = dit(latents, timestep, [branch])
            golden.assert_close(output, velocity[0])


@pytest.mark.parametrize("name", ["I_ti2v_wan22_t2v", "I_ti2v_wan22_i2v"])
def test_official_generation(name: str, tmp_path: Path) -> None:
    golden, config = case(name), case(name).config
    pipe = golden_pipeline(golden, tmp_path)
    if "size_wh" in config:
        width, height = config["size_wh"]
        what = {"width": width, "height": height}
    else:
        picture = Image.fromarray(golden.inputs["image"][0].numpy())
        what = {"input_image": picture, "max_area": config["max_area"]}
    arguments = dict(
        **what, prompt_embeds=golden.inputs["context"][None],
        negative_prompt_embeds=golden.inputs["context_null"][None], latents=golden.inputs["noise"][None],
        num_frames=config["frame_num"], sampler=config["solver"], num_inference_steps=config["steps"],
        sigma_shift=config["shift"], cfg_scale=config["guide_scale"],
    )  # fmt: skip
    latents = pipe(**arguments, output_type="latent")[0]
    golden.assert_close("latents", latents)
    if "z" in golden.outputs:
        golden.assert_close("z", latents[:, :1])
    video = pipe(**arguments, output_type="pt")[0].transpose(0, 1)
    if "video" in golden.outputs:
        golden.assert_close("video", video * 2 - 1)
    # the reference truncates to 8 bits
    golden.assert_close("frames_u8", (video.double() * 255).clamp(0, 255).to(torch.uint8))

"""Image to video, first and last frame, and the image encoder equal the reference implementations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.image import ImageConditioner, ImageInputs, ImageTokensConditioner, size_within
from diffsynth.models.wan.image_encoder import preprocess
from tests.golden import Case, case
from tests.toys import golden_pipeline, load_golden_model

ENCODER, VAE = "wan_video_image_encoder", "wan_video_vae"


@dataclass
class Parts:
    """What the two conditioners see of a pipeline of FLF2V-14B."""

    vae: torch.nn.Module
    image_encoder: torch.nn.Module
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    facts: ClassVar = DiTFacts(planes={"mask": 4, "image": 16}, has_image_positions=True, image_dim=1280)

    def encode_video(self, video: Tensor, **tiles: Any) -> Tensor:
        return self.vae.encode(video, **tiles)


def picture(frames: Tensor) -> Image.Image:
    return Image.fromarray((frames[0] if frames.ndim == 4 else frames).numpy())


def planes_of(y: Tensor) -> dict[str, Tensor]:
    return {"mask": y[:, :4], "image": y[:, 4:]}


def velocities(golden: Case, model: str, folder: Path) -> torch.nn.Module:
    return load_golden_model(golden, model, golden.config, folder, "wan_video_dit")


@pytest.mark.parametrize(
    "name", ["A_i2v_wan21_size0", "A_i2v_wan21_size1", "A_i2v_wan22_A14B_no_clip", "A_flf2v_wan21_size0"]
)
def test_velocity_equals_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    dit = velocities(golden, "model", tmp_path)
    given = {tag.rstrip("0123456789"): tensor for tag, tensor in golden.inputs.items()}
    image = given["clip_fea"].flatten(0, 1)[None] if "clip_fea" in given else None
    conditions = Conditions(text=given["context"][None], image=image, planes=planes_of(given["y"][None]))
    branch = dit.prepare(conditions)
    for output in golden.outputs:
        timestep = torch.tensor([float(output.removeprefix("out_t"))])
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                [velocity] = dit(given["x"][None], timestep, [branch])
            golden.assert_close(output, velocity[0].detach())
            branch.keys.clear()


def test_each_sample_of_a_batch_reads_its_own_picture(tmp_path: Path) -> None:
    golden = case("A_i2v_wan21_batch2")
    dit, inputs = velocities(golden, "model", tmp_path), golden.inputs
    texts = [inputs["context_b0"], inputs["context_b1"]]
    conditions = Conditions(
        text=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
        image=inputs["clip_fea_b"],
        planes=planes_of(torch.stack([inputs["y_b0"], inputs["y_b1"]])),
    )
    latents = torch.stack([inputs["x_b0"], inputs["x_b1"]])
    with torch.no_grad():
        [velocity] = dit(latents, torch.tensor(golden.arguments["t"]), [dit.prepare(conditions)])
    for index in (0, 1):
        golden.assert_close(f"out_{index}", velocity[index])


def test_fun_inp_equals_the_reference(tmp_path: Path) -> None:
    golden = case("C_fun_inp_in36")
    dit, inputs = velocities(golden, "dit", tmp_path), golden.inputs
    conditions = Conditions(text=inputs["context"], image=inputs["clip0"], planes=planes_of(inputs["y0"]))
    with torch.no_grad():
        [velocity] = dit(
            inputs["latents0"], torch.tensor([golden.arguments["timestep"]]), [dit.prepare(conditions)]
        )
    golden.assert_close("out", velocity)


@pytest.mark.parametrize("name", ["F_clip_vision_one_image", "F_clip_vision_two_images"])
def test_image_features_equal_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    encoder = load_golden_model(golden, "visual", golden.config, tmp_path, ENCODER)
    pictures = [((frames.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2) for frames in golden.inputs.values()]
    if "preprocessed" in golden.outputs:
        golden.assert_close("preprocessed", preprocess(pictures[0], golden.config["image_size"]))
    with torch.no_grad():
        golden.assert_close("features", encoder(pictures))


def test_first_and_last_frame_become_the_reference_condition(tmp_path: Path) -> None:
    golden = case("I_flf2v_wan21_condition")
    config = golden.config
    parts = Parts(
        vae=load_golden_model(golden, "vae", config["vae"], tmp_path, VAE),
        image_encoder=load_golden_model(golden, "clip", config["clip"], tmp_path, ENCODER),
    )
    height, width = size_within((40, 60), config["max_area"], (16, 16))
    assert height * width // 256 * 21 == golden.outputs["numbers"][0]
    geometry = Geometry(
        num_videos=1, num_frames=config["frame_num"], height=height, width=width, latent_channels=16,
        latent_frames=21, latent_height=height // 8, latent_width=width // 8,
    )  # fmt: skip
    inputs = ImageInputs(
        input_image=picture(golden.inputs["first"]), end_image=picture(golden.inputs["last"]),
        max_area=config["max_area"],
    )  # fmt: skip
    planes = ImageConditioner().encode(inputs, geometry, parts).planes
    golden.assert_close("y", torch.cat([planes["mask"][0], planes["image"][0]], dim=1)[0])
    told = ImageTokensConditioner().encode(inputs, geometry, parts).image
    assert told is not None and told[1] is None
    num_kept = golden.outputs["clip_fea"].shape[1]  # the case stores the first tokens of each picture
    golden.assert_close("clip_fea", told[0].view(2, -1, 1280)[:, :num_kept])


@pytest.mark.parametrize("name", ["I_i2v_wan21", "I_i2v_wan22_A14B"])
def test_official_image_to_video(name: str, tmp_path: Path) -> None:
    golden, config = case(name), case(name).config
    pipe = golden_pipeline(golden, tmp_path)
    scales = config.get("guide_scale_low_high") or [config["guide_scale"]] * 2
    arguments = dict(
        prompt_embeds=golden.inputs["context"][None],
        negative_prompt_embeds=golden.inputs["context_null"][None], latents=golden.inputs["noise"][None],
        input_image=picture(golden.inputs["image"]), max_area=config["max_area"],
        num_frames=config["frame_num"], sampler=config["solver"], num_inference_steps=config["steps"],
        sigma_shift=config["shift"], cfg_scale=scales[1], cfg_scale_low_noise=scales[0],
    )  # fmt: skip
    golden.assert_close("latents", pipe(**arguments, output_type="latent")[0])
    video = pipe(**arguments, output_type="pt")[0].transpose(0, 1)
    golden.assert_close("frames_u8", (video.double() * 255).clamp(0, 255).to(torch.uint8))

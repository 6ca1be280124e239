"""Fun Control, Reference and Camera, and speed control equal the reference, loaded as users load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.camera import CameraRays, camera_path, moved_poses
from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.reference import Reference
from diffsynth.conditioning.speed import Speed
from diffsynth.denoising.expert import Expert
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.golden import Case, case
from tests.toys import write_checkpoint

TEXT_LEN = 512


def expert_of(golden: Case, folder: Path) -> Expert:
    """Each network from a file of its own; what lies in the DiT's file comes with it."""
    config = golden.config
    files = []
    for model in golden.models:
        own = config.get(model, config)
        files.append(write_checkpoint(folder / model / "model.safetensors", golden.weights(model), own))
    manager = ModelManager(torch_dtype=None, device="cpu").load_models(files)
    expert = WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.float32).parts.high
    assert expert is not None
    return expert


def velocity(expert: Expert, golden: Case, latents: Tensor, timestep: float, **conditions: object) -> Tensor:
    text = golden.inputs["context"]
    branch = expert.dit.prepare(Conditions(text=text, **conditions), expert.adapters)  # type: ignore[arg-type]
    with torch.no_grad():
        [answer] = expert.dit(latents, torch.tensor([timestep]), [branch])
    return answer


def planes_of(y: Tensor, *names: str) -> Mapping[str, Tensor]:
    return dict(zip(names, y.chunk(len(names), dim=1), strict=True))


def test_control_equals_the_reference(tmp_path: Path) -> None:
    golden = case("C_fun_control_in48")
    expert, inputs = expert_of(golden, tmp_path), golden.inputs
    planes = planes_of(inputs["y1"], "control", "image")
    told = (expert, golden, inputs["latents1"], golden.arguments["timestep"])
    golden.assert_close("out", velocity(*told, planes=planes, image=inputs["clip1"]))
    no_image = velocity(*told, planes={"control": planes["control"]}, image=torch.zeros_like(inputs["clip1"]))
    golden.assert_close("out_no_image", no_image)


def test_reference_equals_the_reference(tmp_path: Path) -> None:
    golden = case("C_fun_control_ref_conv")
    expert, inputs = expert_of(golden, tmp_path), golden.inputs
    shared = {"planes": planes_of(inputs["y2"], "control", "image"), "image": inputs["clip2"]}
    told = (expert, golden, inputs["latents2"], golden.arguments["timestep"])
    given = {"reference": Reference(latents=inputs["reference_latents"])}
    golden.assert_close("out", velocity(*told, **shared, adapters=given))
    golden.assert_close("out_without_reference", velocity(*told, **shared))


def test_camera_equals_the_reference(tmp_path: Path) -> None:
    golden = case("C_fun_camera_adapter_in32")
    expert, inputs = expert_of(golden, tmp_path), golden.inputs
    rays = CameraRays(values=inputs["camera"])
    shared = {"planes": planes_of(inputs["y3"], "image"), "image": inputs["clip3"]}
    told = (expert, golden, inputs["latents3"], golden.arguments["timestep"])
    golden.assert_close("out", velocity(*told, **shared, adapters={"camera": rays}))
    golden.assert_close("out_without_camera", velocity(*told, **shared))
    [adapter] = expert.adapters
    with torch.no_grad():
        golden.assert_close("adapter_out", adapter.embed(torch.zeros(1, 96, 2, 4, 2), rays))


@pytest.mark.parametrize("direction", ["Left", "Down", "RightUp"])
def test_rays_of_a_moving_camera_equal_the_reference(direction: str) -> None:
    golden = case("C_camera_coordinates")
    sizes = golden.config
    poses = moved_poses(direction, sizes["length"], speed=sizes["speed"])
    path = camera_path(poses, sizes["height"], sizes["width"])
    rays = torch.stack([path.rays(frame) for frame in (0, 1, sizes["length"] - 1)])
    golden.assert_close(f"plucker_{direction}", rays.permute(0, 2, 3, 1))
    if direction == "RightUp":
        golden.assert_close("latents_input_RightUp", path.latent_frame(path.shape[1] - 1)[:, :, None])


@pytest.mark.parametrize("number", [0, 37, 100])
def test_speed_equals_the_reference(number: int, tmp_path: Path) -> None:
    golden = case("C_motion_controller")
    expert = expert_of(golden, tmp_path)
    [adapter] = expert.adapters
    given = Speed(motion_bucket_id=torch.tensor([float(number)]))
    with torch.no_grad():
        golden.assert_close(f"embedding_{number}", adapter.embedding(given.motion_bucket_id))
    told = (expert, golden, golden.inputs["latents4"], golden.arguments["timestep"])
    golden.assert_close(f"out_{number}", velocity(*told, adapters={"speed": given}))

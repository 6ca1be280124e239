"""VACE equals the reference implementation: its blocks, its context, its generations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.vace import VaceCondition, VaceConditioner, VaceInputs, reference_canvas
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.dit import WanDiT
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.golden import Case, case
from tests.toys import golden_pipeline, load_golden_model


def _networks(golden: Case, folder: Path) -> tuple[WanDiT, DiTAdapter]:
    """The DiT and the VACE blocks of one file."""
    config = {k: v for k, v in golden.config.items() if v is not None}
    dit = load_golden_model(golden, "model", config, folder, "wan_video_dit")
    vace = load_golden_model(golden, "model", config, folder, "wan_video_vace")
    assert isinstance(dit, WanDiT) and isinstance(vace, DiTAdapter)
    vace.join(dit.config)
    return dit, vace


@pytest.mark.parametrize("name", ["B_vace_scale1", "B_vace_scale_other", "B_vace_batch2"])
@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "training"])
def test_velocity_equals_the_reference(name: str, grad: bool, tmp_path: Path) -> None:
    golden = case(name)
    dit, vace = _networks(golden, tmp_path)
    for index, time in enumerate(golden.arguments["t"]):
        latents, context, text = (
            golden.inputs[f"{n}{index}"][None] for n in ("x", "vace_context", "context")
        )
        given = VaceCondition(context=context, scales=(golden.arguments["vace_context_scale"],))
        conditions = Conditions(text=text, adapters={"vace": given})
        with torch.set_grad_enabled(grad):
            branch = dit.prepare(conditions, [vace])
            for _ in range(2):  # the second call finds the kept keys of cross-attention
                [velocity] = dit(latents, torch.tensor([time]), [branch])
                golden.assert_close(f"out_{index}", velocity[0].detach())


def _arguments(golden: Case) -> dict[str, object]:
    mask: Tensor = golden.outputs["mask"]  # (1, F, H, W) in [0, 1]
    inputs = golden.inputs
    given: dict[str, object] = {
        "vace_video": inputs["source"].numpy(), "vace_video_mask": mask[0][:, None],
        "vace_scale": golden.config["context_scale"],
    }  # fmt: skip
    if references := [inputs[name][0].numpy() for name in golden.arguments["refs"]]:
        given["vace_reference_image"] = references
    return given


def _geometry(golden: Case) -> Geometry:
    (width, height), num_frames = golden.config["size_wh"], golden.config["frame_num"]
    return Geometry(
        num_videos=1, num_frames=num_frames, height=height, width=width, latent_channels=16,
        latent_frames=(num_frames - 1) // 4 + 1, latent_height=height // 8, latent_width=width // 8,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["I_vace_mask_no_ref", "I_vace_mask_two_refs"])
def test_context_equals_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    parts = golden_pipeline(golden, tmp_path).parts
    contribution = VaceConditioner().encode(VaceInputs(**_arguments(golden)), _geometry(golden), parts)
    condition = contribution.adapters["vace"][0]
    assert isinstance(condition, VaceCondition) and contribution.latents is not None
    golden.assert_close("vace_context", condition.context[0])
    assert contribution.latents.extra_frames == golden.config["references"]


@pytest.mark.parametrize("name", ["I_vace_mask_no_ref", "I_vace_mask_two_refs"])
def test_generation_equals_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    pipe: WanVideoPipeline = golden_pipeline(golden, tmp_path)
    config, geometry = golden.config, _geometry(golden)
    arguments = dict(
        **_arguments(golden), prompt_embeds=golden.inputs["context"][None],
        negative_prompt_embeds=golden.inputs["context_null"][None], latents=golden.inputs["noise"][None],
        height=geometry.height, width=geometry.width, num_frames=geometry.num_frames,
        sampler=config["solver"], num_inference_steps=config["steps"], sigma_shift=config["shift"],
        cfg_scale=config["guide_scale"],
    )  # fmt: skip
    golden.assert_close("latents", pipe(**arguments, output_type="latent")[0])
    video = pipe(**arguments, output_type="pt")
    levels = (video[0].transpose(0, 1).double() * 255).clamp(0, 255).to(torch.uint8)
    golden.assert_close("frames_u8", levels)


@pytest.mark.parametrize("index", [0, 1])
def test_references_stand_on_white_as_officially(index: int) -> None:
    golden = case("I_vace_reference_canvas")
    width, height = golden.config["size_wh"]
    canvas = reference_canvas(golden.inputs[f"refimg{index}"][0].numpy(), height, width)
    golden.assert_close(f"canvas{index}_every_7th_11th", canvas[:, 3::7, 5::11])

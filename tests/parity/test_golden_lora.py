"""LoRA files of five dialects give the weights and the velocity that other implementations computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from tests.golden import FOLDER, Case, case, names
from tests.toys import write_checkpoint

CASES = names("K_")


def loaded(golden: Case, folder: Path) -> tuple[ModelManager, WanDiT]:
    file = write_checkpoint(folder / "model.safetensors", golden.weights("base"), golden.config["dit"])
    manager = ModelManager(torch_dtype=None, device="cpu").load_models([file])
    dit = manager.fetch_model("wan_video_dit")
    assert isinstance(dit, WanDiT)
    return manager, dit


def velocity(golden: Case, dit: WanDiT) -> torch.Tensor:
    with torch.no_grad():
        branch = dit.prepare(Conditions(text=golden.inputs["context"][None]))
        [out] = dit(golden.inputs["x"][None], torch.tensor([golden.arguments["t"]]), [branch])
    return out[0]


@pytest.mark.parametrize("name", CASES)
def test_fused_weights_and_velocity_equal_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    manager, dit = loaded(golden, tmp_path)
    before = {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    manager.load_lora(FOLDER / golden.entry["lora_file"], lora_alpha=golden.arguments["strength"])
    merged = dit.state_dict()
    for output in golden.outputs:
        if output.startswith("merged."):
            golden.assert_close(output, merged[output.removeprefix("merged.")])
    untouched = [key for key in merged if f"merged.{key}" not in golden.outputs]
    assert untouched and all(torch.equal(merged[key], before[key]) for key in untouched)
    golden.assert_close("forward_out", velocity(golden, dit))


@pytest.mark.parametrize("name", CASES)
def test_attached_lora_gives_the_velocity_of_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    manager, dit = loaded(golden, tmp_path)
    before = velocity(golden, dit)
    manager.load_lora(
        FOLDER / golden.entry["lora_file"], golden.arguments["strength"], name="style", mode="attach"
    )
    golden.assert_close("forward_out", velocity(golden, dit))
    manager.unload_lora("style")
    assert torch.equal(velocity(golden, dit), before)

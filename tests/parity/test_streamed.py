"""Within a limit on memory the golden generations and the tiny Wan keep every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from tests.golden import case
from tests.toys import golden_pipeline


def _check(pipe: WanVideoPipeline, arguments: dict[str, object]) -> None:
    expected = pipe(**arguments, output_type="latent")
    assert pipe.dit is not None and isinstance(expected, Tensor)
    half = sum(p.numel() for p in pipe.dit.parameters()) // 2
    for num_persistent in (0, half):
        pipe.enable_vram_management(num_persistent)
        assert torch.equal(pipe(**arguments, output_type="latent"), expected), num_persistent
        counts = pipe._residency.counts("dit")
        assert counts is not None and counts.copies
    pipe.disable_vram_management()
    assert torch.equal(pipe(**arguments, output_type="latent"), expected)


@pytest.mark.parametrize("name", ["I_t2v_wan21_unipc", "I_t2v_wan22_A14B"])
def test_golden_generations(name: str, tmp_path: Path) -> None:
    golden = case(name)
    width, height = golden.config["size_wh"]
    arguments: dict[str, object] = {
        "prompt_embeds": golden.inputs["context"][None], "latents": golden.inputs["noise"][None],
        "negative_prompt_embeds": golden.inputs["context_null"][None], "height": height, "width": width,
        "num_frames": golden.config["frame_num"], "num_inference_steps": golden.config["steps"],
    }  # fmt: skip
    _check(golden_pipeline(golden, tmp_path), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_the_tiny_wan(dtype: torch.dtype) -> None:
    manager = ModelManager(torch_dtype=dtype, device="cpu").load_models(tiny_folder())
    pipe = WanVideoPipeline.from_model_manager(manager)
    _check(pipe, {"prompt": "a red circle moves right", "seed": 0, "num_inference_steps": 2, "num_frames": 5})

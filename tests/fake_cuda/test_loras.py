"""LoRAs on weights that are on the GPU, visit it, are streamed, or are kept in fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.ops.fp8 import FP8
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.fake_cuda.arrangements import read_through_a_ring
from tests.unit.lora.files import comfy_file

WIDTH, HIDDEN = 48, 64
SIZES = {"self_attn.q": (WIDTH, WIDTH), "cross_attn.k": (WIDTH, WIDTH), "ffn.0": (HIDDEN, WIDTH)}
LAYERS = {f"blocks.{i}.{name}": size for i in range(4) for name, size in SIZES.items()}
ARRANGED: dict[str, tuple[str, torch.dtype, dict[str, Any] | None]] = {
    "resident": ("cuda", torch.bfloat16, None),
    "visiting": ("cpu", torch.bfloat16, None),
    "streamed": ("cpu", torch.bfloat16, {"num_persistent_param_in_dit": 0}),
    "ring": ("cpu", torch.bfloat16, None),
    "fp8": ("cuda", FP8, None),
    "fp8-streamed": ("cpu", FP8, {"num_persistent_param_in_dit": 0}),
}
IN_DEFAULT = {("streamed", "fuse"), ("visiting", "attach")}


@pytest.mark.parametrize(
    ("arranged", "mode"),
    [
        pytest.param(name, mode, marks=() if (name, mode) in IN_DEFAULT else pytest.mark.slow)
        for name in ARRANGED
        for mode in ("fuse", "attach")
    ],
)
def test_a_lora_comes_changes_and_goes(arranged: str, mode: Any, tmp_path: Path) -> None:
    where, dtype, limits = ARRANGED[arranged]
    manager = ModelManager(dtype, where).load_models(toy_files("t2v", num_layers=4))
    pipe = WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.bfloat16, device="cuda")
    if arranged == "ring":
        read_through_a_ring(pipe)
    if limits:
        pipe.enable_vram_management(**limits)
    call = {
        "prompt": "a",
        "negative_prompt": "b",
        "seed": 0,
        "progress_bar_cmd": iter,
        "output_type": "latent",
    }
    pipe(**call)
    [report] = pipe.load_lora(comfy_file(tmp_path / "style.safetensors", LAYERS), 0.8, mode=mode)
    assert "style" in str(report)
    pipe(**call)
    pipe.set_lora("style", 0.3)
    pipe(**call)
    pipe.disable_lora()
    pipe.unload_lora()
    pipe(**call)

"""What a pipeline says of its LoRAs, as long as they are there."""

from __future__ import annotations

from pathlib import Path

from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.toys import TOY_DIT
from tests.unit.lora.files import comfy_file


def test_each_lora_is_described_as_it_is_now_until_it_is_unloaded(toy_folder: Path, tmp_path: Path) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_folder, device="cpu")
    plain = pipe.describe()
    assert "LoRA" not in plain
    layers = {"blocks.0.ffn.0": (TOY_DIT.ffn_dim, TOY_DIT.dim)}
    for name, mode in (("style", "fuse"), ("motion", "attach")):
        pipe.load_lora(comfy_file(tmp_path / f"{name}.safetensors", layers), 0.5, mode=mode)  # type: ignore[arg-type]
    text = pipe.describe()
    assert "'style' (comfy, rank 4) fused into 1 layers of wan_video_dit, strength 0.5" in text
    assert "'motion' (comfy, rank 4) attached to 1 layers of wan_video_dit, strength 0.5" in text
    pipe.set_lora("style", 0.25)
    pipe.set_lora("motion", [1.0, 0.5])
    pipe.disable_lora("style")
    text = pipe.describe()
    assert "layers of wan_video_dit, off (strength 0.25 when it is on): " in text
    assert "layers of wan_video_dit, strengths 1, 0.5 by step: " in text
    pipe.unload_lora()
    assert pipe.describe() == plain

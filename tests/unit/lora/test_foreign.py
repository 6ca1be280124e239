"""LoRAs of other models are told by name; files of two stages are two LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth.errors import LoRAError
from diffsynth.lora.foreign import foreign_family
from diffsynth.lora.formats import open_loras
from tests.unit.lora.files import pair, write

FOREIGN = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.alpha": "Stable Diffusion",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "Stable Diffusion",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "Stable Diffusion",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": "Stable Diffusion XL",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.alpha": "Stable Diffusion XL",
    "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k.lora_A.weight": "Stable Diffusion XL",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "Flux",
    "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight": "Flux",
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": "Flux",
    "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.img_mod.1.lora_A.weight": "Qwen-Image",
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": "LTX-Video or CogVideoX",
}
WAN = (
    "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "transformer.blocks.0.attn1.to_q.lora_A.weight",
    "diffusion_model.vace_blocks.0.cross_attn.q.lora_A.weight",
    "lora_unet__blocks_0_ffn_0.alpha",
    "blocks.0.self_attn.q.lora_A.default.weight",
)


@pytest.mark.parametrize(("key", "family"), FOREIGN.items(), ids=list(FOREIGN.values()))
def test_a_lora_of_another_model_is_told_by_name(key: str, family: str, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", {key: torch.zeros(4, 8)})
    with pytest.raises(LoRAError, match=f"style.safetensors is a LoRA for {family}"):
        open_loras(path)


@pytest.mark.parametrize("key", WAN)
def test_a_lora_of_wan_is_of_no_other_family(key: str) -> None:
    assert foreign_family([key, "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"]) is None
    assert foreign_family([key]) is None


@pytest.mark.parametrize("stages", [(1, 2), (1,), (2,)], ids=str)
def test_both_stages_of_ai_toolkit_are_told_apart(stages: tuple[int, ...], tmp_path: Path) -> None:
    tensors, factors = {}, {}
    for stage in stages:
        factors[stage] = pair(48, 48)
        start = f"diffusion_model.transformer_{stage}.blocks.0.self_attn.q"
        tensors[f"{start}.lora_A.weight"], tensors[f"{start}.lora_B.weight"] = factors[stage]
    found = {lora.role: lora for lora in open_loras(write(tmp_path / "both.safetensors", tensors))}
    assert set(found) == {{1: "high", 2: "low"}[stage] for stage in stages}
    for stage in stages:
        lora = found[{1: "high", 2: "low"}[stage]]  # type: ignore[index]
        change = lora.layers["blocks.0.self_attn.q"].weight
        assert change is not None and lora.dialect == "comfy" and not lora.unread
        assert torch.equal(change.down, factors[stage][0])  # type: ignore[union-attr]

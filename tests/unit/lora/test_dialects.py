"""What is written reads back as written; what a dialect cannot name is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.errors import LoRAError
from diffsynth.lora.changes import Decomposed, LowRank, delta
from diffsynth.lora.dialects import DIALECTS, to_low_rank, write_loras
from diffsynth.lora.formats import LayerChange, LoRA, read_loras
from diffsynth.lora.names import FlatNames, diffusers_name, flat, official_name
from tests.unit.checkpoints.weights import manifests
from tests.unit.lora.files import drawn, pair, read, write

WITH_ALPHA = ("comfy", "kohya")
LAYERS = ("blocks.0.self_attn.q", "blocks.11.cross_attn.o", "blocks.0.ffn.0", "blocks.0.ffn.2", "head.head",
          "vace_blocks.1.before_proj", "blocks.3.cross_attn.k_img", "time_projection.1")  # fmt: skip


def toy(alpha: float | None, dtype: torch.dtype = torch.float32, rank: int = 4) -> LoRA:
    layers = {}
    for name in LAYERS:
        down, up = pair(12, 8, rank)
        layers[name] = LayerChange(weight=LowRank(down.to(dtype), up.to(dtype), alpha))
    return LoRA(layers=layers, dialect="toy")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [None, 4.0, 1.0, 3.0], ids=lambda a: f"alpha-{a}")
def test_each_dialect_reads_back_as_written(
    dialect: str, dtype: torch.dtype, alpha: float | None, tmp_path: Path
) -> None:
    lora = toy(alpha, dtype)
    write_loras(tmp_path / "out.safetensors", [lora], dialect)
    back = read(tmp_path / "out.safetensors")
    assert back.dialect == dialect and set(back.layers) == set(LAYERS) and not back.unread
    for name, layer in lora.layers.items():
        old, new = layer.weight, back.layers[name].weight
        assert isinstance(old, LowRank) and isinstance(new, LowRank)
        assert torch.equal(new.down, old.down) and new.up.dtype == dtype
        if dialect in WITH_ALPHA:
            assert torch.equal(new.up, old.up) and new.scale == old.scale
            assert alpha is None or new.alpha == alpha
        else:
            assert new.alpha is None
            exact = old.up.double() * old.scale
            if old.scale in (1.0, 0.25):
                assert torch.equal(new.up.double(), exact)
            ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
            assert ((new.up.double() - exact).abs() <= ulp).all()


def test_every_linear_of_a_real_model_has_a_name_in_every_dialect() -> None:
    for model in ("wan2.1_t2v_14b", "wan2.1_i2v_14b_480p", "wan2.1_vace_14b"):
        shapes = manifests()[model]
        linears = [
            n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2
        ]
        flats = FlatNames()
        for name in linears:
            other = diffusers_name(name)
            assert other is not None and official_name(other) == name and official_name(name) == name
            assert flats.find(flat(name)) == name == flats.find(flat(other))


def test_layers_and_kinds_without_a_name_are_listed(tmp_path: Path) -> None:
    down, up = pair(12, 8)
    kron = {
        "diffusion_model.blocks.0.ffn.0.lokr_w1": drawn(2, 2),
        "diffusion_model.blocks.0.ffn.0.lokr_w2": drawn(6, 4),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": drawn(8),
        "diffusion_model.strange.layer.lora_A.weight": down,
        "diffusion_model.strange.layer.lora_B.weight": up,
    }  # fmt: skip
    lora = read(write(tmp_path / "in.safetensors", kron))
    out = tmp_path / "out.safetensors"
    with pytest.raises(LoRAError) as error:
        write_loras(out, [lora], "diffusers")
    for part in ("3 of 3", "blocks.0.ffn.0 (lokr_w1, lokr_w2)", "norm_q (diff)", "strange.layer (the layer)"):
        assert part in str(error.value)
    assert not out.exists()
    with pytest.raises(LoRAError, match="1 of 3 layers"):
        write_loras(out, [lora], "kohya")
    write_loras(out, [lora], "comfy")
    same = read(out)
    assert set(same.layers) == set(lora.layers)


def test_lokr_becomes_a_and_b_by_svd(tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.ffn.0"
    low = drawn(6, 1) @ drawn(1, 4)  # kron with a 2 x 2 matrix: rank 2
    file = write(tmp_path / "in.safetensors", {f"{name}.lokr_w1": drawn(2, 2), f"{name}.lokr_w2": low})
    lora = read(file)
    old = lora.layers["blocks.0.ffn.0"].weight
    small = to_low_rank(lora, 2)
    write_loras(tmp_path / "out.safetensors", [small], "peft")
    new = read(tmp_path / "out.safetensors").layers["blocks.0.ffn.0"].weight
    assert old is not None and isinstance(new, LowRank) and new.rank == 2
    zeros = torch.zeros(old.shape)
    assert torch.allclose(delta(new, zeros), delta(old, zeros), atol=1e-6)


def test_dora_and_biases_survive_where_they_have_a_name(tmp_path: Path) -> None:
    down, up = pair(12, 8)
    weight = Decomposed(LowRank(down, up, 2.0), drawn(12, 1))
    lora = LoRA(layers={"blocks.0.ffn.0": LayerChange(weight=weight)}, dialect="toy")
    for dialect in WITH_ALPHA:
        write_loras(tmp_path / "dora.safetensors", [lora], dialect)
        back = read(tmp_path / "dora.safetensors").layers["blocks.0.ffn.0"].weight
        assert isinstance(back, Decomposed) and torch.equal(back.magnitude, weight.magnitude)
    with pytest.raises(LoRAError, match="dora_scale"):
        write_loras(tmp_path / "no.safetensors", [lora], "diffusers")
    bias = LayerChange(weight=LowRank(down, up, 2.0), bias=drawn(12))
    lora = LoRA(layers={"blocks.0.ffn.0": bias}, dialect="toy")
    for dialect in ("comfy", "diffusers"):
        write_loras(tmp_path / "bias.safetensors", [lora], dialect)
        back = read(tmp_path / "bias.safetensors").layers["blocks.0.ffn.0"]
        assert back.bias is not None and bias.bias is not None and torch.equal(back.bias, bias.bias)


def test_alpha_in_the_metadata_of_diffusers_is_applied(tmp_path: Path) -> None:
    down, up = pair(12, 8)
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8,
                "transformer.alpha_pattern": {"blocks.1.attn1.to_q": 2}}  # fmt: skip
    keys = {
        f"transformer.blocks.{i}.attn1.to_q.lora_{p}.weight": t
        for i in (0, 1)
        for p, t in (("A", down), ("B", up))
    }
    file = write(tmp_path / "a.safetensors", keys, {"lora_adapter_metadata": json.dumps(settings)})
    layers = read(file).layers
    scales = [layers[f"blocks.{i}.self_attn.q"].weight.scale for i in (0, 1)]  # type: ignore[union-attr]
    assert scales == [2.0, 0.5]


def test_two_names_for_one_layer_are_an_error(tmp_path: Path) -> None:
    down, up = pair(12, 8)
    keys = {
        "lora_unet_blocks_0_ffn_0.lora_down.weight": down, "lora_unet_blocks_0_ffn_0.lora_up.weight": up,
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": down,
    }  # fmt: skip
    with pytest.raises(LoRAError, match="names one layer twice"):
        read(write(tmp_path / "a.safetensors", keys))


def test_a_file_for_both_experts_is_two_loras(tmp_path: Path) -> None:
    down, up = pair(12, 8)
    keys = {
        f"{t}.blocks.0.attn1.to_q.lora_{p}.weight": x * s
        for t, s in (("transformer", 1.0), ("transformer_2", 2.0)) for p, x in (("A", down), ("B", up))
    }  # fmt: skip
    file = write(tmp_path / "both.safetensors", keys)
    loras = read_loras(Checkpoint.open(file))
    assert {lora.role: lora.num_keys for lora in loras} == {"high": 2, "low": 2}
    write_loras(tmp_path / "again.safetensors", loras, "diffusers")
    assert set(Checkpoint.open(tmp_path / "again.safetensors").shapes) == set(keys)
    with pytest.raises(LoRAError, match="both experts"):
        write_loras(tmp_path / "no.safetensors", loras, "comfy")


def test_other_keys_are_kept_by_name(tmp_path: Path) -> None:
    down, up = pair(12, 8)
    keys = {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": down,
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": up,
        "dwpose_embedding.0.weight": drawn(3), "lora_te_layer.lora_down.weight": down,
    }  # fmt: skip
    lora = read(write(tmp_path / "a.safetensors", keys))
    assert lora.unread == {
        "no part of a LoRA": ("dwpose_embedding.0.weight",),
        "for the text encoder, whose LoRAs are not read": ("lora_te_layer.lora_down.weight",),
    }
    assert lora.num_keys == 4

"""Each kind of change equals its formula, written out in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.errors import LoRAError
from diffsynth.lora import changes as module
from diffsynth.lora.changes import changed, delta
from tests.unit.lora.files import drawn, read, write

N, K, R = 24, 16, 4
LAYER = "blocks.0.ffn.0"


def spelled() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Name -> tensors of a file, and the change of a weight W that they stand for."""
    w, down, up = drawn(N, K).double(), drawn(R, K), drawn(N, R)
    d, u = down.double(), up.double()
    alpha = torch.tensor(3.0)
    hada = {
        "hada_w1_a": drawn(N, R),
        "hada_w1_b": drawn(R, K),
        "hada_w2_a": drawn(N, R),
        "hada_w2_b": drawn(R, K),
    }
    h = {name: t.double() for name, t in hada.items()}
    w1, w2_a, w2_b = drawn(6, 2), drawn(4, R), drawn(R, 8)
    row, column = drawn(N, 1).abs() + 1, drawn(1, K).abs() + 1
    turned = w + 3 / R * u @ d
    rows = row.double() * turned / turned.norm(dim=1, keepdim=True) - w
    columns = column.double() * turned / turned.norm(dim=0, keepdim=True) - w
    flat, comfy = "lora_unet_blocks_0_ffn_0", f"diffusion_model.{LAYER}"
    named = {
        "peft": (f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight", ""),
        "pipe-dit": (f"pipe.dit.{LAYER}.lora_A.weight", f"pipe.dit.{LAYER}.lora_B.weight", ""),
        "bare": (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", ""),
        "base-model": (
            f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight", "",
        ),
        "comfy-ab": (f"{comfy}.lora_A.weight", f"{comfy}.lora_B.weight", f"{comfy}.alpha"),
        "comfy-updown": (f"{comfy}.lora_down.weight", f"{comfy}.lora_up.weight", f"{comfy}.alpha"),
        "kohya": (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"),
        "videox-fun": (
            "lora_unet__blocks_0_ffn_0.lora_down.weight", "lora_unet__blocks_0_ffn_0.lora_up.weight",
            "lora_unet__blocks_0_ffn_0.alpha",
        ),
        "diffusers": (
            "transformer.blocks.0.ffn.net.0.proj.lora_A.weight",
            "transformer.blocks.0.ffn.net.0.proj.lora_B.weight", "",
        ),
        "diffusers-bare": (
            "blocks.0.ffn.net.0.proj.lora_A.default.weight",
            "blocks.0.ffn.net.0.proj.lora_B.default.weight", "",
        ),
        "fastvideo": (f"{LAYER}.lora_A", f"{LAYER}.lora_B", f"{LAYER}.lora_alpha"),
    }  # fmt: skip
    found = {
        name: ({a: down, b: up, **({c: alpha} if c else {})}, (3 / R if c else 1.0) * u @ d)
        for name, (a, b, c) in named.items()
    }
    found |= {
        "loha": (
            {f"{flat}.{part}": t for part, t in hada.items()} | {f"{flat}.alpha": alpha},
            3 / R * (h["hada_w1_a"] @ h["hada_w1_b"]) * (h["hada_w2_a"] @ h["hada_w2_b"]),
        ),
        "lokr": (
            {f"{comfy}.lokr_w1": w1, f"{comfy}.lokr_w2_a": w2_a, f"{comfy}.lokr_w2_b": w2_b,
             f"{comfy}.alpha": alpha},
            3 / R * torch.kron(w1.double(), w2_a.double() @ w2_b.double()),
        ),
        "lokr-whole": (
            {f"{comfy}.lokr_w1": w1, f"{comfy}.lokr_w2": w2_a @ w2_b, f"{comfy}.alpha": alpha},
            torch.kron(w1.double(), (w2_a @ w2_b).double()),
        ),
        "diff": ({f"{comfy}.diff": u.float() @ down}, (u.float() @ down).double()),
        "dora-rows": (
            {f"{comfy}.lora_A.weight": down, f"{comfy}.lora_B.weight": up, f"{comfy}.alpha": alpha,
             f"{comfy}.dora_scale": row}, rows,
        ),
        "dora-columns": (
            {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": alpha,
             f"{flat}.dora_scale": column}, columns,
        ),
    }  # fmt: skip
    return {name: (tensors, expected) for name, (tensors, expected) in found.items()} | {"": ({"w": w}, w)}


NAMES = [name for name in spelled() if name]


@pytest.mark.parametrize("name", NAMES)
def test_each_dialect_gives_the_change_of_its_formula(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    cases = spelled()
    tensors, expected = cases[name]
    weight = cases[""][1]
    lora = read(write(tmp_path / "lora.safetensors", tensors))
    assert list(lora.layers) == [LAYER] and not lora.unread
    change = lora.layers[LAYER].weight
    assert change is not None and change.shape == (N, K)
    found = delta(change, weight, torch.float64)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    half = changed(weight, [(change, 0.5)], torch.float64) - weight
    assert (half - expected / 2).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_pieces_give_the_same_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = spelled()
    change = read(write(tmp_path / "lora.safetensors", cases[name][0])).layers[LAYER].weight
    assert change is not None
    whole = changed(cases[""][1], [(change, 0.7)], torch.float64)
    monkeypatch.setattr(module, "CPU_PIECE_BYTES", 5 * 4 * K)
    assert torch.allclose(
        changed(cases[""][1], [(change, 0.7)], torch.float64), whole, rtol=1e-12, atol=1e-14
    )


def test_changes_of_convolutions_vectors_and_modulation(tmp_path: Path) -> None:
    down, up = drawn(2, 3, 1, 2, 2), drawn(8, 2, 1, 1, 1)
    names = "diffusion_model.patch_embedding", "diffusion_model.blocks.1"
    tensors = {
        f"{names[0]}.lora_down.weight": down, f"{names[0]}.lora_up.weight": up,
        f"{names[1]}.self_attn.norm_q.diff": drawn(8), f"{names[1]}.diff_m": drawn(1, 6, 8),
        f"{names[1]}.ffn.0.diff_b": drawn(8),
    }  # fmt: skip
    layers = read(write(tmp_path / "lora.safetensors", tensors)).layers
    assert set(layers) == {
        "patch_embedding", "blocks.1.self_attn.norm_q", "blocks.1.modulation", "blocks.1.ffn.0"
    }  # fmt: skip
    weight = drawn(8, 3, 1, 2, 2)
    expected = weight + torch.einsum("nrabc,rkxyz->nkxyz", up, down)
    conv = layers["patch_embedding"].weight
    assert conv is not None and torch.allclose(
        changed(weight, [(conv, 1.0)], torch.float32), expected, atol=1e-6
    )
    for name, shape in (("blocks.1.self_attn.norm_q", (8,)), ("blocks.1.modulation", (1, 6, 8))):
        change = layers[name].weight
        assert change is not None
        assert changed(torch.zeros(shape), [(change, 2.0)], torch.float32).shape == shape
    assert layers["blocks.1.ffn.0"].weight is None and layers["blocks.1.ffn.0"].bias is not None


def test_factors_that_do_not_multiply_are_refused(tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    file = write(
        tmp_path / "a.safetensors",
        {f"{name}.lora_A.weight": drawn(4, 8), f"{name}.lora_B.weight": drawn(8, 5)},
    )
    with pytest.raises(LoRAError, match="do not multiply"):
        read(file)
    with pytest.raises(LoRAError, match="lacks up"):
        read(write(tmp_path / "b.safetensors", {f"{name}.lora_A.weight": drawn(4, 8)}))

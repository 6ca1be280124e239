"""Tensors come as views of the mapped file, renamed, joined and widened only where they must be."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.checkpoints.build import build
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.layouts import (
    DIFFUSERS_DIT,
    DIFFUSERS_VAE21,
    DIFFUSERS_VAE22,
    HF_CLIP_VISION,
    LAYOUTS,
    UMT5,
)
from diffsynth.errors import CorruptCheckpointError, UnsupportedModelError
from diffsynth.models.registry import ARCHITECTURES
from tests.unit.checkpoints.weights import manifests, toy_dit, write_header, write_sparse, write_sparse_pth

PAIRS = [
    (DIFFUSERS_DIT, "wan2.1_t2v_1.3b", "diffusers_wan2.1_t2v_1.3b_transformer"),
    (DIFFUSERS_DIT, "wan2.1_i2v_14b_480p", "diffusers_wan2.1_i2v_14b_transformer"),
    (DIFFUSERS_DIT, "wan2.1_flf2v_14b_720p", "diffusers_wan2.1_flf2v_14b_transformer"),
    (DIFFUSERS_DIT, "wan2.1_vace_1.3b", "diffusers_wan2.1_vace_1.3b_transformer"),
    (DIFFUSERS_DIT, "wan2.1_vace_14b", "diffusers_wan2.1_vace_14b_transformer"),
    (DIFFUSERS_DIT, "wan2.2_i2v_a14b", "diffusers_wan2.2_i2v_a14b_transformer"),
    (DIFFUSERS_DIT, "wan2.2_ti2v_5b", "diffusers_wan2.2_ti2v_5b_transformer"),
    (DIFFUSERS_DIT, "wan2.2_animate_14b", "diffusers_wan2.2_animate_14b_transformer"),
    (DIFFUSERS_VAE21, "wan2.1_vae", "diffusers_wan2.1_vae"),
    (DIFFUSERS_VAE22, "wan2.2_vae", "diffusers_wan2.2_vae"),
    (UMT5, "umt5_xxl_enc_bf16", "diffusers_umt5_xxl_text_encoder"),
    (HF_CLIP_VISION, "clip_xlm_roberta_vit_h_14", "diffusers_clip_vision_model"),
]
# Official tensors without a counterpart: fixed blur kernels, the text tower, a projection that nobody reads.
ONE_SIDED = (".kernel", "textual.", "log_scale", "visual.head", "visual_projection")


def counted(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in ONE_SIDED)}


@pytest.mark.parametrize(("layout", "official", "other"), PAIRS, ids=[pair[1] for pair in PAIRS])
def test_published_headers_are_renamed_into_each_other(
    layout, official: str, other: str, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    ours = Checkpoint.open(write_sparse(tmp_path / "ours.safetensors", manifests()[official]))
    theirs = Checkpoint.open(write_sparse(tmp_path / "theirs.safetensors", manifests()[other]))
    assert counted(dict(theirs.renamed(layout).shapes)) == counted(dict(ours.shapes))
    assert counted(dict(ours.renamed(layout.inverse()).shapes)) == counted(dict(theirs.shapes))


@pytest.mark.parametrize("other", [pair[2] for pair in PAIRS])
def test_a_layout_is_recognised_by_its_marks_alone(other: str) -> None:
    names = manifests()[other]
    found = [layout for layout in LAYOUTS if all(mark in names for mark in layout.marks)]
    assert found == [next(pair[0] for pair in PAIRS if pair[2] == other)]
    official = manifests()[next(pair[1] for pair in PAIRS if pair[2] == other)]
    assert not [layout for layout in LAYOUTS if all(mark in official for mark in layout.marks)]


def open_saved(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Checkpoint:
    save_file(weights, path, metadata=metadata)
    return Checkpoint.open(path)


def test_values_survive_splitting_joining_squeezing_and_transposing(tmp_path: Path) -> None:
    weights = {
        "face_adapter.fuser_blocks.0.linear1_kv.weight": torch.randn(8, 3),
        "motion_encoder.enc.net_app.convs.2.conv2.2.bias": torch.randn(1, 5, 1, 1),
        "visual.transformer.1.attn.to_qkv.bias": torch.randn(12),
        "visual.cls_embedding": torch.randn(1, 1, 4),
        "visual.pos_embedding": torch.randn(1, 5, 4),
        "visual.head": torch.randn(4, 2),
    }
    ours = open_saved(tmp_path / "a.safetensors", weights)
    theirs = ours.renamed(DIFFUSERS_DIT.inverse()).renamed(HF_CLIP_VISION.inverse())
    k, v = weights["face_adapter.fuser_blocks.0.linear1_kv.weight"].chunk(2)
    assert torch.equal(theirs.tensor("face_adapter.0.to_k.weight"), k)
    assert torch.equal(theirs.tensor("face_adapter.0.to_v.weight"), v)
    assert theirs.shapes["motion_encoder.res_blocks.1.conv2.act_fn.bias"] == (5,)
    head = weights["visual.head"]
    assert torch.equal(theirs.tensor("visual_projection.weight"), head.T)
    back = theirs.renamed(HF_CLIP_VISION).renamed(DIFFUSERS_DIT)
    assert dict(back.shapes) == dict(ours.shapes)
    for name, weight in weights.items():
        assert torch.equal(back.tensor(name), weight), name


def test_a_toy_vae_with_other_stages_is_renamed(tmp_path: Path) -> None:
    from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE

    weights = WanVideoVAE(VAEConfig(dim=12, num_res_blocks=1)).state_dict()
    ours = open_saved(tmp_path / "vae.safetensors", weights)
    theirs = ours.renamed(DIFFUSERS_VAE21.inverse())
    assert "decoder.up_blocks.2.upsamplers.0.resample.1.weight" in theirs
    back = theirs.renamed(DIFFUSERS_VAE21)
    assert set(back.shapes) == set(weights)
    assert all(torch.equal(back.tensor(name), weight) for name, weight in weights.items())


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    weights = {
        "face_adapter.0.to_k.weight": torch.zeros(4, 3),
        "face_adapter.0.to_v.weight": torch.zeros(4, 2),
    }
    with pytest.raises(CorruptCheckpointError, match="do not fit together"):
        open_saved(tmp_path / "a.safetensors", weights).renamed(DIFFUSERS_DIT)


# no copies


def anonymous_kib() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))


def mapped_range(path: Path) -> tuple[int, int]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    assert len(lines) == 1, "one map per file"
    low, high = lines[0].split()[0].split("-")
    return int(low, 16), int(high, 16)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
def test_a_model_larger_than_memory_opens_and_costs_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{kind}"
    (write_sparse if kind == "safetensors" else write_sparse_pth)(path, manifests()["wan2.1_t2v_14b"])
    torch.zeros(1)  # torch's own start-up is not counted
    before = anonymous_kib()
    checkpoint = Checkpoint.open(path)
    assert checkpoint.num_bytes == 2 * 14_288_491_584
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
    assert anonymous_kib() - before < 16 << 10
    low, high = mapped_range(path)
    assert all(low <= tensor.data_ptr() < high for tensor in tensors.values())
    assert float(tensors["blocks.39.ffn.2.weight"][-1, -1]) == 0.0


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_built_network_is_made_of_views(kind: str, tmp_path: Path) -> None:
    network = toy_dit()
    path = tmp_path / f"dit.{kind}"
    if kind == "pth":
        torch.save(network.state_dict(), path)
        (tmp_path / "dit.json").write_text('{"num_heads": 3}')
    else:
        save_file(network.state_dict(), path, metadata={"config": '{"num_heads": 3}'})
    (match,) = detect(Checkpoint.open(path), ARCHITECTURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = build(match)
    low, high = mapped_range(path)
    for name, tensor in built.state_dict().items():
        assert low <= tensor.data_ptr() < high, name
        assert torch.equal(tensor, network.state_dict()[name])
    assert not built.training and not any(p.requires_grad for p in built.parameters())


def test_writing_into_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint = open_saved(path, {"w": torch.ones(4)})
    before = path.read_bytes()
    checkpoint.tensor("w").mul_(5)
    assert checkpoint.tensor("w").tolist() == [5.0] * 4
    assert path.read_bytes() == before
    assert Checkpoint.open(path).tensor("w").tolist() == [1.0] * 4


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}
    raw = json.dumps({"w": entry}).encode()
    raw += b" " * ((3 - len(raw)) % 4)
    path = tmp_path / "a.safetensors"
    weight = torch.randn(8, 8)
    path.write_bytes(
        len(raw).to_bytes(8, "little") + raw + bytes(weight.view(torch.uint8).flatten().tolist())
    )
    tensor = Checkpoint.open(path).tensor("w")
    assert tensor.data_ptr() % 4 == 3
    assert torch.equal(tensor, weight) and torch.equal(tensor @ tensor, weight @ weight)


def test_strided_and_shared_tensors_of_torch_are_read(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    weights = {
        "t": base.T,
        "every_other": base[:, ::2],
        "row": base[2],
        "same": base,
        "empty": base[:0],
        "one": base[0, 0],
    }
    torch.save(weights, tmp_path / "a.pth")
    checkpoint = Checkpoint.open(tmp_path / "a.pth")
    for name, weight in weights.items():
        assert checkpoint.shapes[name] == tuple(weight.shape)
        assert torch.equal(checkpoint.tensor(name), weight), name


def test_a_dtype_that_torch_lacks_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = write_header(
        tmp_path / "a.safetensors", {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, 2
    )
    checkpoint = Checkpoint.open(path)
    assert checkpoint.dtypes == {"w": "F4"}
    with pytest.raises(UnsupportedModelError, match="F4"):
        checkpoint.tensor("w")


# quantised weights

E4M3 = torch.float8_e4m3fn


def fp8(rows: int = 8, columns: int = 6) -> Tensor:
    return torch.randn(rows, columns).to(E4M3)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("side", "scale"),
    [
        pytest.param("scale_weight", torch.tensor(0.5), id="legacy-scalar"),
        pytest.param("scale_weight", torch.tensor([0.25]), id="legacy-one"),
        pytest.param("weight_scale", torch.tensor(2.0), id="comfy-quant"),
        pytest.param("weight_scale", torch.rand(8, 1).bfloat16() + 0.5, id="lightx2v-per-row"),
        pytest.param("weight_scale", torch.rand(8) + 0.5, id="per-row-flat"),
        pytest.param("scale_weight", torch.rand(8, 3, 1) + 0.5, id="musubi-blocks"),
    ],
)
def test_scaled_fp8_is_widened(side: str, scale: Tensor, dtype: torch.dtype | None, tmp_path: Path) -> None:
    weights = {
        "m.weight": fp8(),
        f"m.{side}": scale,
        "m.bias": torch.randn(8),
        "scaled_fp8": torch.zeros(2).to(E4M3),
    }
    weights |= (
        {"m.scale_input": torch.tensor(1.0)}
        if side == "scale_weight"
        else {"m.input_scale": torch.tensor(1.0)}
    )
    checkpoint = open_saved(tmp_path / "a.safetensors", weights)
    assert set(checkpoint.shapes) == {"m.weight", "m.bias"}
    assert checkpoint.quantisation == "fp8-scaled" and checkpoint.dtypes["m.weight"] == "F8_E4M3"
    if scale.ndim == 3:
        wide = (weights["m.weight"].float().view(8, 3, 2) * scale).view(8, 6)
    else:
        wide = weights["m.weight"].float() * (
            scale.float().view(8, 1) if scale.numel() == 8 else scale.float()
        )
    assert torch.equal(checkpoint.tensor("m.weight", dtype=dtype), wide.to(dtype or torch.bfloat16))
    raw, stored_scale = checkpoint.stored("m.weight")
    assert raw.dtype == E4M3 and stored_scale is not None and stored_scale.dtype == torch.float32


def test_plain_fp8_is_widened_and_kept(tmp_path: Path) -> None:
    weights = {"m.weight": fp8(), "m.bias": torch.randn(8)}
    checkpoint = open_saved(tmp_path / "a.safetensors", weights)
    assert checkpoint.quantisation == "fp8"
    assert torch.equal(checkpoint.tensor("m.weight"), weights["m.weight"].bfloat16())
    raw, scale = checkpoint.stored("m.weight")
    assert raw.dtype == E4M3 and scale is None
    assert checkpoint.tensor("m.bias").dtype == torch.float32


def conf(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_int8_of_comfy_quant_is_widened(tmp_path: Path) -> None:
    weight = torch.randint(-127, 128, (4, 4), dtype=torch.int8)
    weights = {
        "m.weight": weight,
        "m.weight_scale": torch.tensor(0.01),
        "m.comfy_quant": conf('{"format": "int8_tensorwise"}'),
    }
    checkpoint = open_saved(tmp_path / "a.safetensors", weights)
    assert checkpoint.quantisation == "int8-scaled" and list(checkpoint.shapes) == ["m.weight"]
    assert torch.equal(checkpoint.tensor("m.weight", dtype=torch.float32), weight.float() * 0.01)


@pytest.mark.parametrize(
    ("sides", "metadata"),
    [
        ({"m.comfy_quant": conf('{"format": "nvfp4"}')}, None),
        ({"m.weight_scale_2": torch.ones(())}, None),
        ({"m.pre_quant_scale": torch.ones(6)}, None),
        ({}, {"_quantization_metadata": json.dumps({"layers": {"m": {"format": "mxfp8"}}})}),
        ({"m.weight_scale": torch.ones(5)}, None),
    ],
    ids=["nvfp4", "second-scale", "pre-scale", "metadata", "scale-of-no-shape"],
)
def test_a_quantisation_that_cannot_be_undone_is_refused_when_read(
    sides: dict[str, Tensor], metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    weights = {"m.weight": fp8(), "m.weight_scale": torch.ones(()), **sides}
    checkpoint = open_saved(tmp_path / "a.safetensors", weights, metadata)
    assert list(checkpoint.shapes) == ["m.weight"]
    with pytest.raises(UnsupportedModelError, match=r"m\.weight"):
        checkpoint.tensor("m.weight")


def test_names_like_scales_without_a_weight_are_weights(tmp_path: Path) -> None:
    checkpoint = open_saved(
        tmp_path / "a.safetensors", {"m.weight_scale": torch.ones(3), "n.scale_weight": torch.ones(2)}
    )
    assert set(checkpoint.shapes) == {"m.weight_scale", "n.scale_weight"}


def test_scales_survive_joining_and_splitting(tmp_path: Path) -> None:
    k, v = fp8(4, 3), fp8(4, 3)
    weights = {
        "face_adapter.0.to_k.weight": k,
        "face_adapter.0.to_k.weight_scale": torch.tensor(2.0),
        "face_adapter.0.to_v.weight": v,
        "face_adapter.0.to_v.weight_scale": torch.rand(4, 1),
    }
    joined = open_saved(tmp_path / "a.safetensors", weights).renamed(DIFFUSERS_DIT)
    name = "face_adapter.fuser_blocks.0.linear1_kv.weight"
    wide = torch.cat([k.float() * 2.0, v.float() * weights["face_adapter.0.to_v.weight_scale"]])
    assert torch.equal(joined.tensor(name, dtype=torch.float32), wide)
    raw, scale = joined.stored(name)
    assert raw.dtype == E4M3 and scale is not None and scale.shape == (8, 1)
    apart = joined.renamed(DIFFUSERS_DIT.inverse())
    assert torch.equal(apart.tensor("face_adapter.0.to_v.weight", dtype=torch.float32), wide[4:])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_scaled_fp8_dit_is_recognised_and_built(prefix: str, tmp_path: Path) -> None:
    network = toy_dit()
    weights: dict[str, Tensor] = {f"{prefix}scaled_fp8": torch.zeros(2).to(E4M3)}
    for name, weight in network.state_dict().items():
        if name.startswith("blocks.") and weight.ndim == 2:
            scale = weight.abs().max() / 448
            weights[prefix + name] = (weight / scale).to(E4M3)
            weights[prefix + name.removesuffix("weight") + "scale_weight"] = scale.view(1)
        else:
            weights[prefix + name] = weight
    checkpoint = open_saved(tmp_path / "dit.safetensors", weights, {"config": '{"num_heads": 3}'})
    (match,) = detect(checkpoint, ARCHITECTURES)
    assert match.layout == ("comfyui+fp8-scaled" if prefix else "official+fp8-scaled")
    assert match.left_over == []
    built = build(match, torch.float32)
    for name, weight in network.state_dict().items():
        # e4m3 keeps 3 bits of the mantissa: half a step is 1/16 of the value, and 2^-10 of the scale near
        # zero
        assert torch.allclose(
            built.state_dict()[name], weight, rtol=1 / 16, atol=float(weight.abs().max()) / 448
        ), name

"""Networks whose blocks are kept in fp8, from file to video."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Conditions
from diffsynth.errors import CorruptCheckpointError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.text_encoder import WanTextEncoder
from diffsynth.ops.fp8 import FP8, Fp8Linear, fp8_layers
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from diffsynth.vram_management.fp8 import WidenOnce
from tests.toys import TOY_DIT, TOY_FILES, TOY_TEXT_ENCODER, write_toy, write_toy_dit
from tests.unit.cli.running import Shell

CONFIG = replace(TOY_DIT, num_layers=4)  # the first and the last block stay wide
DIT, TEXT_ENCODER, VAE = "wan_video_dit", "wan_video_text_encoder", "wan_video_vae"
Q = "blocks.1.self_attn.q"


@pytest.fixture(scope="module")
def dit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_dit(tmp_path_factory.mktemp("fp8") / "dit.safetensors", config=CONFIG)


def load(path: Path, name: str = DIT, dtype: torch.dtype | None = FP8) -> nn.Module:
    network = ModelManager(dtype, "cpu", file_path_list=path).fetch_model(name)
    assert network is not None
    return network


def fp8_names(network: nn.Module) -> set[str]:
    return {name for name, tensor in network.named_parameters() if tensor.dtype == FP8}


def rewritten(source: Path, path: Path, changes: dict[str, Tensor]) -> Path:
    """The file with some tensors changed or added; configuration and all."""
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(source), **changes}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


# what is kept in fp8


def test_linear_layers_of_inner_blocks_are_kept_in_fp8(dit_file: Path) -> None:
    network = load(dit_file)
    expected = {
        f"blocks.{block}.{layer}.weight"
        for block in (1, 2)
        for layer in [
            *(f"{attention}_attn.{part}" for attention in ("self", "cross") for part in "qkvo"),
            "ffn.0",
            "ffn.2",
        ]
    }
    assert fp8_names(network) == expected
    others = {tensor.dtype for name, tensor in network.named_parameters() if name not in expected}
    assert others == {torch.bfloat16}
    assert {name for name, _ in network.named_buffers()} == {f"{name}_scale" for name in expected}
    assert not any(tensor.requires_grad for tensor in network.parameters()) and not network.training
    assert isinstance(network, WanDiT) and network.dtype == torch.bfloat16
    allowed = {name for name, m in network.named_modules() if isinstance(m, Fp8Linear) and m.may_multiply}
    assert allowed == {n.removesuffix(".weight") for n in expected if "cross_attn" not in n}


def test_all_linear_layers_of_the_text_encoder_are_and_nothing_else(toy_folder: Path) -> None:
    network = load(toy_folder / TOY_FILES["text_encoder"], TEXT_ENCODER)
    assert fp8_names(network) == {
        f"blocks.0.{layer}.weight"
        for layer in (*(f"attn.{part}" for part in "qkvo"), "ffn.gate.0", "ffn.fc1", "ffn.fc2")
    }
    assert isinstance(network, WanTextEncoder) and not any(m.may_multiply for m in fp8_layers(network))


def test_a_network_without_a_policy_is_in_bfloat16_and_says_so(
    toy_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "diffsynth"):
        network = load(toy_folder / TOY_FILES["vae"], VAE)
    assert {tensor.dtype for tensor in network.parameters()} == {torch.bfloat16}
    assert f"{VAE}: no layers that keep well in fp8; its weights are bfloat16" in caplog.text


def test_the_log_says_what_is_kept_and_how_it_computes(
    dit_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "diffsynth"):
        load(dit_file)
    assert re.search(rf"Loaded {DIT} .*: bfloat16/fp8 \(e4m3, per row\), ", caplog.text)
    assert f"{DIT}: 20 Linear layers in fp8 (e4m3, per row), widened to multiply" in caplog.text


def test_the_manager_computes_in_bfloat16(dit_file: Path) -> None:
    manager = ModelManager(FP8, "cpu")
    assert manager.torch_dtype == torch.bfloat16 and manager.storage_dtype == FP8
    manager.load_models(dit_file).load_models(dit_file, torch_dtype=torch.float32)
    assert [bool(fp8_names(network)) for network in manager.model] == [True, False]
    wide = ModelManager(torch.float32, "cpu").load_models(dit_file, torch_dtype=FP8)
    assert fp8_names(wide.model[0]) and wide.torch_dtype == torch.float32


# where the elements come from


def test_weights_are_quantised_per_row(dit_file: Path) -> None:
    layer = load(dit_file).get_submodule(Q)
    weight = load_file(dit_file)[f"{Q}.weight"]
    assert isinstance(layer, Fp8Linear)
    assert torch.allclose(layer.weight_scale[:, 0], weight.abs().amax(dim=1) / 448, rtol=1e-6)
    # half a step of 3 bits of mantissa, and of the smallest step (2^-9) near zero
    assert torch.allclose(
        layer.widened(torch.float32), weight, rtol=1 / 16, atol=float(layer.weight_scale.max()) / 1024
    )


ELEMENTS = torch.randn(48, 48, generator=torch.Generator().manual_seed(0)).mul(50)


@pytest.mark.parametrize(
    ("side", "scale"),
    [
        pytest.param(None, None, id="plain"),
        pytest.param("scale_weight", torch.tensor(0.002), id="per-tensor"),
        pytest.param("weight_scale", torch.linspace(0.001, 0.003, 48).view(48, 1), id="per-row"),
        pytest.param("weight_scale", torch.linspace(0.001, 0.003, 48).bfloat16(), id="per-row-bfloat16"),
    ],
)
def test_e4m3_files_keep_their_own_elements_and_scales(
    side: str | None, scale: Tensor | None, dit_file: Path, tmp_path: Path
) -> None:
    stored = ELEMENTS.to(FP8)
    changes = {f"{Q}.weight": stored, "blocks.0.self_attn.q.weight": stored}
    if side and scale is not None:
        changes |= {f"{Q}.{side}": scale, f"blocks.0.self_attn.q.{side}": scale}
    network = load(rewritten(dit_file, tmp_path / "dit.safetensors", changes))
    layer = network.get_submodule(Q)
    assert isinstance(layer, Fp8Linear)
    assert torch.equal(layer.weight.float(), stored.float())
    rows = torch.ones(48, 1) if scale is None else scale.float().reshape(-1, 1).expand(48, 1)
    assert torch.equal(layer.weight_scale, rows) and layer.weight_scale.shape == (48, 1)
    first = network.get_submodule("blocks.0.self_attn.q").weight
    assert first.dtype == torch.bfloat16, "stays wide, whatever the file has"
    assert torch.equal(first, (stored.float() * rows).bfloat16())


@pytest.mark.parametrize(
    ("stored", "scale"),
    [
        pytest.param(ELEMENTS.to(FP8), torch.linspace(0.001, 0.003, 96).view(48, 2, 1), id="blocks-of-rows"),
        pytest.param(ELEMENTS.div(1000).to(torch.float8_e5m2), None, id="e5m2"),
        pytest.param(ELEMENTS.clamp(-127, 127).to(torch.int8), torch.tensor(0.001), id="int8"),
    ],
)
def test_other_formats_are_rounded_anew(
    stored: Tensor, scale: Tensor | None, dit_file: Path, tmp_path: Path
) -> None:
    changes = {f"{Q}.weight": stored} | ({} if scale is None else {f"{Q}.weight_scale": scale})
    path = rewritten(dit_file, tmp_path / "dit.safetensors", changes)
    layer = load(path).get_submodule(Q)
    wide = load(path, dtype=torch.float32).get_submodule(Q).weight
    assert isinstance(layer, Fp8Linear) and layer.weight.dtype == FP8
    assert torch.allclose(layer.weight_scale, wide.abs().amax(dim=1, keepdim=True) / 448, rtol=1e-6)
    assert torch.allclose(
        layer.widened(torch.float32), wide, rtol=1 / 16, atol=float(layer.weight_scale.max()) / 1024
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({f"{Q}.weight": torch.full((48, 48), float("nan"))}, id="weight"),
        pytest.param(
            {f"{Q}.weight": ELEMENTS.to(FP8), f"{Q}.weight_scale": torch.tensor(float("inf"))}, id="scale"
        ),
    ],
)
def test_what_is_not_finite_is_named_with_its_file(
    changes: dict[str, Tensor], dit_file: Path, tmp_path: Path
) -> None:
    path = rewritten(dit_file, tmp_path / "broken.safetensors", changes)
    with pytest.raises(CorruptCheckpointError, match=rf"{re.escape(Q)}\.weight in .*broken\.safetensors"):
        load(path)


# what comes out


def velocities(network: nn.Module) -> list[Tensor]:
    """Both sides of the guidance in one call."""
    assert isinstance(network, WanDiT)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator)
    texts = [torch.randn(1, 6, 32, generator=generator) for _ in range(2)]
    with torch.no_grad():
        branches = [network.prepare(Conditions(text=text)) for text in texts]
        return network(latents, torch.tensor([700.0]), branches)  # type: ignore[no-any-return]


def rms_error(made: list[Tensor], exact: list[Tensor]) -> float:
    difference = torch.stack(made).double() - torch.stack(exact).double()
    return float(difference.norm() / torch.stack(exact).double().norm())


def test_velocities_stay_near_those_of_bfloat16(dit_file: Path) -> None:
    error = rms_error(velocities(load(dit_file)), velocities(load(dit_file, dtype=torch.bfloat16)))
    # Each weight errs by 2.65 % on its own. Of 4 blocks 2 are in fp8; what they add to the stream errs by
    # some 4 % (two products in a row), and it is the smaller part of the stream: 1.3 % here.
    assert 0.003 < error < 0.02


def test_sharing_widened_weights_changes_no_bit(dit_file: Path) -> None:
    network = load(dit_file)
    assert isinstance(network, WanDiT) and isinstance(network.visit, WidenOnce)
    shared = velocities(network)
    network.visit = network.visit.inner
    assert all(torch.equal(a, b) for a, b in zip(shared, velocities(network), strict=True))


def test_fp8_products_stay_near_too(dit_file: Path) -> None:
    network = load(dit_file)
    wide = velocities(network)
    for layer in fp8_layers(network):
        layer.compute = "fp8" if layer.may_multiply else "widened"
    try:
        made = velocities(network)
    except RuntimeError as error:
        pytest.skip(f"this torch multiplies no fp8 row by row on a CPU: {error}")
    assert 0.003 < rms_error(made, wide) < 0.02, "tokens are rounded as weights are, with the same effect"


def test_features_of_text_stay_near_those_of_bfloat16(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "t5.safetensors", WanTextEncoder(TOY_TEXT_ENCODER), TOY_TEXT_ENCODER)
    ids = torch.arange(12).view(1, 12)
    made, exact = (load(path, TEXT_ENCODER, dtype)(ids) for dtype in (FP8, torch.bfloat16))
    # The gated layer's three weights err by 2.65 % each, 4.6 % together; attention adds less. 4.3 % here.
    assert 0.01 < rms_error([made], [exact]) < 0.06


def test_the_tiny_wan_draws_in_fp8() -> None:
    pipe = WanVideoPipeline.from_pretrained(tiny_folder(), torch_dtype=FP8, device="cpu")
    assert pipe.torch_dtype == torch.bfloat16
    text = pipe.describe()
    assert "40 Linear layers in fp8 (e4m3, per row), widened to multiply" in text
    assert "fp8 (e4m3, per row) on cpu" in text and "bfloat16 on cpu" in text and "float8" not in text
    video = pipe(
        "a red circle", seed=0, num_frames=5, num_inference_steps=2, output_type="pt", progress_bar_cmd=list
    )
    assert video.shape == (1, 5, 3, 64, 64) and video.std() > 0.01
    assert all(layer.room is None for layer in fp8_layers(pipe.dit or nn.Module()))


def test_the_command_keeps_weights_in_fp8(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, out = Shell(monkeypatch, capsys), tmp_path / "video.mp4"
    options = ("--device", "cpu", "--dtype", "fp8", "--steps", 1, "--out", out)
    ran = shell("generate", "a red circle", "--model", toy_folder, *options)
    assert ran.status == 0, ran.err
    assert "wan_video_text_encoder: 7 Linear layers in fp8 (e4m3, per row), widened to multiply" in ran.err
    assert f"{DIT}: no layers that keep well in fp8" in ran.err, "two blocks, both at the edge"
    assert out.stat().st_size > 0

"""Decode and encode of the VAEs: counted tensor by tensor, and kept under a limit."""

from __future__ import annotations

import pytest
import torch

from diffsynth.models.wan import vae_layers
from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE
from diffsynth.models.wan.vae22 import PATCH, VAE22Config, WanVideoVAE22
from diffsynth.models.wan.vae_coding import CausalVAE
from diffsynth.vram_management import activations
from diffsynth.vram_management.activations import Workload, vae_activations, vae_encode_activations
from diffsynth.vram_management.layers import LayerSpec, layers_of_module
from tests.unit.vram_management.plans import GIB, LARGE, dit_sizes, phase, plan, weights
from tests.unit.vram_management.test_plan_against_block import LiveBytes

LARGE_5B = {"height": 704, "width": 1280, "num_frames": 121}


def pipeline_5b(vae_dtype: str) -> tuple[LayerSpec, ...]:
    return (
        *weights("dit", "wan2.2_ti2v_5b"),
        *weights("text_encoder", "umt5_xxl_enc_bf16"),
        *weights("vae", "wan2.2_vae", vae_dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@torch.no_grad()
def test_a_decode_takes_what_the_plan_says(kind: str, dtype: torch.dtype) -> None:
    small: CausalVAE = (
        WanVideoVAE22(VAE22Config(dim=8, dec_dim=32)) if kind == "2.2" else WanVideoVAE(VAEConfig(dim=16))
    )
    vae = small.to(dtype)
    height, width = 12, 16
    with LiveBytes() as live:
        for chunk in vae.decode_stream(torch.randn(1, vae.z_dim, 3, height, width)):
            del chunk
    work = Workload(
        height=height * vae.spatial_stride, width=width * vae.spatial_stride, num_frames=9, device="cpu",
        compute_dtype="F32" if dtype == torch.float32 else "BF16",
    )  # fmt: skip
    planned = vae_activations(layers_of_module("vae", vae), work, tiled=False)
    # above by what a history holds that is not yet full, never below by more than pieces of a norm
    assert 0.98 * live.peak <= planned <= 1.15 * live.peak


@pytest.mark.parametrize("num_frames", [1, 9])
@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@torch.no_grad()
def test_an_encode_takes_what_the_plan_says(
    kind: str, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_layers, "PIECE_BYTES", 1 << 12)  # beside a toy a piece of a norm would be much
    vae: CausalVAE = (
        WanVideoVAE22(VAE22Config(dim=32, dec_dim=8)) if kind == "2.2" else WanVideoVAE(VAEConfig(dim=16))
    )
    height, width = 64, 96
    video = torch.zeros(1, 3, num_frames, height, width, dtype=torch.uint8)
    with LiveBytes() as live:
        vae.encode(video)
    work = Workload(
        height=height, width=width, num_frames=num_frames, device="cpu", compute_dtype="F32",
    )  # fmt: skip
    planned = vae_encode_activations(layers_of_module("vae", vae), work, tiled=False)
    assert 0.98 * live.peak <= planned <= 1.05 * live.peak


def test_the_patch_is_that_of_the_network() -> None:
    assert activations.PATCH == PATCH


@pytest.mark.parametrize(("vae_dtype", "is_tiled"), [("BF16", False), ("F32", True)])
def test_5b_at_its_own_size_stays_below_12_gib(vae_dtype: str, is_tiled: bool) -> None:
    found = plan(pipeline_5b(vae_dtype), dit=dit_sizes("wan2.2_ti2v_5b"), vram_limit_gib=12, **LARGE_5B)
    assert found.tiled_vae == is_tiled
    assert all(one.peak_bytes + found.reserve_bytes <= 12 * GIB for one in found.phases)
    whole = plan(weights("vae", "wan2.2_vae", vae_dtype), dit=None, **LARGE_5B)
    assert (phase(whole, "vae").peak_bytes > 12 * GIB) == is_tiled


def test_a_smaller_limit_brings_tiles_and_a_limit_too_small_is_told() -> None:
    from diffsynth.errors import MemoryBudgetError

    vae = weights("vae", "wan2.2_vae")
    found = plan(vae, dit=None, vram_limit_gib=7, **LARGE_5B)
    assert found.tiled_vae and phase(found, "vae").peak_bytes + found.reserve_bytes <= 7 * GIB
    with pytest.raises(MemoryBudgetError, match="phase 'vae'"):
        plan(vae, dit=None, vram_limit_gib=5, **LARGE_5B)


@pytest.mark.parametrize(
    ("limit", "is_tiled", "encodes_tiled"), [(12, False, False), (6, True, False), (5, True, True)]
)
def test_an_encode_goes_in_tiles_only_where_the_whole_does_not_fit(
    limit: float, is_tiled: bool, encodes_tiled: bool
) -> None:
    vae = weights("vae", "wan2.1_vae")
    found = plan(vae, dit=None, vram_limit_gib=limit, **LARGE)
    assert (found.tiled_vae, found.tiled_encode) == (is_tiled, encodes_tiled)
    assert phase(found, "encode").peak_bytes + found.reserve_bytes <= limit * GIB
    assert any("encode: it works in tiles" in note for note in found.notes) == encodes_tiled
    without = plan(vae, dit=None, vram_limit_gib=limit, encodes=False, **LARGE)
    assert [one.name for one in without.phases] == ["vae"]
    assert (
        without.tiled_encode == is_tiled
    )  # nobody counted an encode: none is taken to fit where a decode does not


def test_a_plan_counts_an_encode_where_the_networks_read_pictures() -> None:
    vae = weights("vae", "wan2.1_vae")
    of_text = plan((*weights("dit", "wan2.1_t2v_14b"), *vae))
    of_image = plan((*weights("dit", "wan2.1_i2v_14b_480p"), *vae), dit=dit_sizes("wan2.1_i2v_14b_480p"))
    assert [one.name for one in of_text.phases] == ["dit", "vae"]
    assert [one.name for one in of_image.phases] == ["encode", "dit", "vae"]
    decoder_only = [layer for layer in vae if not layer.name.startswith("encoder.")]
    assert [one.name for one in plan(decoder_only, dit=None).phases] == ["vae"]

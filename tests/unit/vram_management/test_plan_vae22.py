"""The decode of the Wan2.2 VAE: counted tensor by tensor, and kept under a limit."""

from __future__ import annotations

import pytest
import torch

from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE
from diffsynth.models.wan.vae22 import PATCH, VAE22Config, WanVideoVAE22
from diffsynth.models.wan.vae_coding import CausalVAE
from diffsynth.vram_management import activations
from diffsynth.vram_management.activations import Workload, vae_activations
from diffsynth.vram_management.layers import LayerSpec, layers_of_module
from tests.unit.vram_management.plans import GIB, dit_sizes, phase, plan, weights
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

"""TI2V and the Wan2.2 VAE equal diffusers': same weights, noise and noise levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.vae22 import LATENT_MEAN, LATENT_STD, WanVideoVAE22
from tests.golden_recipe import recipe_frames, recipe_input
from tests.parity.test_peers_images import GUIDANCE, NUM_STEPS, assert_near, drawn, grid, ours, texts

VAE_TOLERANCE = 1e-5  # relative L2 in float32: the same sums in another order
HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 9
LATENT_SIZE = (1, 48, 3, HEIGHT // 16, WIDTH // 16)


def peer_vae() -> Any:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=12, z_dim=48, num_res_blocks=1, is_residual=True, in_channels=12,
        out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=list(LATENT_MEAN),
        latents_std=list(LATENT_STD),
    )  # fmt: skip
    return drawn(vae, 2)


def peer_parts() -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=48, out_channels=48, text_dim=24,
        freq_dim=32, ffn_dim=48, num_layers=2,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return {"transformer": drawn(transformer, 1), "vae": peer_vae(), "scheduler": scheduler}


@pytest.mark.parametrize("has_picture", [False, True], ids=["text-to-video", "image-to-video"])
def test_generation_equals_diffusers(has_picture: bool, tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    parts, noise = peer_parts(), recipe_input("noise", LATENT_SIZE)
    picture = {}
    if has_picture:
        [frame] = recipe_frames("peers", 1, HEIGHT, WIDTH)
        picture = {"image": Image.fromarray(frame.numpy())}
    kind = WanImageToVideoPipeline if has_picture else WanPipeline
    peer = kind(tokenizer=None, text_encoder=None, expand_timesteps=True, **parts)
    peer.set_progress_bar_config(disable=True)
    expected = peer(
        height=HEIGHT, width=WIDTH, num_frames=NUM_FRAMES, num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE, latents=noise, output_type="latent", **picture, **texts(),
    ).frames  # fmt: skip
    latents = ours(parts, tmp_path)(
        input_image=picture.get("image"), height=HEIGHT, width=WIDTH, num_frames=NUM_FRAMES,
        cfg_scale=GUIDANCE, sampler="unipc", latents=noise, output_type="latent",
        **grid(parts["scheduler"], NUM_STEPS), **texts(),
    )  # fmt: skip
    assert_near(latents, expected)


@torch.no_grad()
def test_vae_equals_diffusers(tmp_path: Path) -> None:
    peer = peer_vae()
    peer.save_pretrained(tmp_path / "vae")
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models([tmp_path / "vae"])
    vae = manager.fetch_model("wan_video_vae")
    assert isinstance(vae, WanVideoVAE22)
    video = recipe_input("video", (1, 3, NUM_FRAMES, HEIGHT, WIDTH)).clamp(-1, 1)
    latents = recipe_input("latents", LATENT_SIZE)
    for made, expected in (
        (vae.encode(video, normalise=False), peer.encode(video).latent_dist.mode()),
        (vae.decode(latents, normalise=False).clamp(-1, 1), peer.decode(latents).sample),
    ):
        assert made.shape == expected.shape
        assert float((made - expected).norm() / expected.norm()) <= VAE_TOLERANCE

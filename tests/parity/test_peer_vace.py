"""A whole VACE generation equals that of diffusers' pipeline, with the same weights, noise and grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline

HEIGHT, WIDTH, NUM_FRAMES, STEPS = 32, 48, 9, 4
TOLERANCE = 1e-4  # relative L2 in float32: the same terms in another order, through four guided steps


def _shaken(network: nn.Module) -> nn.Module:
    """Every parameter with a value that matters: training starts some at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=generator)
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(1 + 0.1 * noise if p.ndim == 1 and p.mean() > 0.5 else noise / max(fan_in, 16) ** 0.5)
    return network.eval()


def _pictures(count: int, seed: int, height: int = HEIGHT, width: int = WIDTH) -> list[Image.Image]:
    levels = np.random.default_rng(seed).integers(0, 256, (count, height // 8, width // 8, 3), np.uint8)
    return [Image.fromarray(frame).resize((width, height)) for frame in levels]


@pytest.mark.parametrize("num_references", [0, 1])
def test_generation_equals_diffusers(num_references: int, tmp_path: Path) -> None:
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanVACEPipeline,
        WanVACETransformer3DModel,
    )

    transformer = _shaken(
        WanVACETransformer3DModel(
            num_attention_heads=3, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=48,
            freq_dim=64, ffn_dim=128, num_layers=3, vace_layers=[0, 2], vace_in_channels=96,
        )
    )  # fmt: skip
    vae = _shaken(AutoencoderKLWan(base_dim=16, num_res_blocks=1))
    transformer.save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    peer = WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )
    peer.set_progress_bar_config(disable=True)
    video, mask = _pictures(NUM_FRAMES, 1), [frame.convert("L") for frame in _pictures(NUM_FRAMES, 2)]
    references = _pictures(num_references, 3, height=40, width=24)
    text, negative = torch.randn(1, 11, 48), torch.randn(1, 7, 48)
    noise = torch.randn(1, 16, num_references + 3, HEIGHT // 8, WIDTH // 8)
    expected = peer(
        prompt_embeds=nn.functional.pad(text, (0, 0, 0, 501)),
        negative_prompt_embeds=nn.functional.pad(negative, (0, 0, 0, 505)), video=video, mask=mask,
        reference_images=references or None, conditioning_scale=0.7, height=HEIGHT, width=WIDTH,
        num_frames=NUM_FRAMES, num_inference_steps=STEPS, guidance_scale=4.0, latents=noise.clone(),
        output_type="latent",
    ).frames  # fmt: skip

    manager = ModelManager(torch_dtype=None, device="cpu")
    manager.load_models([tmp_path / "transformer", tmp_path / "vae"])
    made = WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.float32)(
        prompt_embeds=text, negative_prompt_embeds=negative, vace_video=video, vace_video_mask=mask,
        vace_reference_image=references or None, vace_scale=0.7, height=HEIGHT, width=WIDTH,
        num_frames=NUM_FRAMES, cfg_scale=4.0, latents=noise, sampler="unipc",
        sigmas=scheduler.sigmas[:-1], timesteps=scheduler.timesteps, output_type="latent",
    )  # fmt: skip
    assert isinstance(made, torch.Tensor)
    expected = expected[:, :, num_references:]  # the peer leaves the reference's own latent in front
    error = float((made - expected).norm() / expected.norm())
    assert error <= TOLERANCE, f"relative error {error:.2e}"

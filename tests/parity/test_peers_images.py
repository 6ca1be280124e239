"""Generations from pictures and videos equal diffusers' pipelines: same weights, noise and noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.golden_recipe import recipe_frames, recipe_input, recipe_state_dict

TOLERANCE = 1e-4  # relative L2 of the latents after 4 steps in float32, sums in another order
SIZE, NUM_FRAMES, GUIDANCE, NUM_STEPS = 112, 5, 4.0, 4  # 112: multiple of 16, and of CLIP's patch of 14
LATENT_SIZE = (1, 16, 2, SIZE // 8, SIZE // 8)
IMAGE_TOKENS = 1 + (SIZE // 14) ** 2


def drawn(network: nn.Module, seed: int) -> nn.Module:
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(recipe_state_dict(shapes, seed))
    return network.eval()


def peer_parts(in_channels: int, **image: object) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=in_channels, out_channels=16, text_dim=24,
        freq_dim=32, ffn_dim=48, num_layers=2, **image,
    )  # fmt: skip
    return {
        "transformer": drawn(transformer, 1),
        "vae": drawn(AutoencoderKLWan(base_dim=8, num_res_blocks=1), 2),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def with_image_encoder() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE,
        patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_resize=False
    )
    encoder = CLIPVisionModel(config)
    shapes = {name: tuple(t.shape) for name, t in encoder.state_dict().items() if t.is_floating_point()}
    encoder.load_state_dict(recipe_state_dict(shapes, 3), strict=False)
    return {"image_encoder": encoder.eval(), "image_processor": processor}


def ours(parts: Mapping[str, Any], folder: Path) -> WanVideoPipeline:
    """Write the peer's parts in its own layout and load them."""
    names = [name for name in ("transformer", "vae", "image_encoder") if name in parts]
    for name in names:
        parts[name].save_pretrained(folder / name)
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models([folder / n for n in names])
    return WanVideoPipeline.from_model_manager(manager)


def texts() -> dict[str, Tensor]:
    rows = {name: recipe_input(name, (1, 512, 24)) for name in ("prompt_embeds", "negative_prompt_embeds")}
    for name, length in (("prompt_embeds", 9), ("negative_prompt_embeds", 4)):
        rows[name][:, length:] = 0.0  # as both pipelines pad
    return rows


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray(frame.numpy()) for frame in recipe_frames("peers", count, SIZE, SIZE)]


def grid(scheduler: Any, num_steps: int, start: int = 0) -> dict[str, Any]:
    scheduler.set_timesteps(num_steps)
    return {"sigmas": scheduler.sigmas[start:-1], "timesteps": scheduler.timesteps[start:]}


def assert_near(latents: Tensor, expected: Tensor) -> None:
    assert latents.shape == expected.shape
    error = float((latents - expected).norm() / expected.norm())
    assert error <= TOLERANCE, f"relative L2 of the latents is {error:.2e}"


@pytest.mark.parametrize("kind", ["i2v-clip", "flf2v-clip", "i2v-no-clip", "inp-end-no-clip"])
def test_image_to_video_equals_diffusers(kind: str, tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    has_clip, has_end = not kind.endswith("no-clip"), kind.startswith(("flf2v", "inp"))
    image: dict[str, Any] = {"image_dim": 32, "added_kv_proj_dim": 32} if has_clip else {}
    if kind.startswith("flf2v"):
        image["pos_embed_seq_len"] = 2 * IMAGE_TOKENS
    parts = {**peer_parts(36, **image), **(with_image_encoder() if has_clip else {})}
    noise, (first, last) = recipe_input("noise", LATENT_SIZE), pictures(2)
    peer = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, **parts)
    peer.set_progress_bar_config(disable=True)
    expected = peer(
        image=first, last_image=last if has_end else None, height=SIZE, width=SIZE, num_frames=NUM_FRAMES,
        num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE, latents=noise, output_type="latent",
        **texts(),
    ).frames  # fmt: skip
    latents = ours(parts, tmp_path)(
        input_image=first, end_image=last if has_end else None, height=SIZE, width=SIZE,
        num_frames=NUM_FRAMES, cfg_scale=GUIDANCE, sampler="unipc", latents=noise, output_type="latent",
        **grid(parts["scheduler"], NUM_STEPS), **texts(),
    )  # fmt: skip
    assert_near(latents, expected)


def test_a_repository_with_its_own_settings_equals_diffusers(tmp_path: Path) -> None:
    """Statistics of the VAE and the scheduler's shift come from the repository's files, not from a call."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline

    row = [i / 10 for i in range(1, 17)]
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1, latents_mean=row, latents_std=row[::-1])
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0
    )
    parts = {"transformer": peer_parts(36)["transformer"], "vae": drawn(vae, 2), "scheduler": scheduler}
    noise, (first,) = recipe_input("noise", LATENT_SIZE), pictures(1)
    peer = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, image_encoder=None, **parts)
    peer.set_progress_bar_config(disable=True)
    size = {"height": SIZE, "width": SIZE, "num_frames": NUM_FRAMES}
    expected = peer(
        image=first, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE, latents=noise, output_type="pt",
        **size, **texts(),
    ).frames  # fmt: skip
    for name in ("vae", "transformer", "scheduler"):
        parts[name].save_pretrained(tmp_path / name)
    pipe = WanVideoPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, device="cpu")
    call: dict[str, Any] = {"input_image": first, "sampler": "unipc", "latents": noise, **size, **texts()}
    steps: list[float] = []

    def note(pipe: object, step: int, timestep: Tensor, tensors: object) -> None:
        steps.append(float(timestep))

    pipe(**call, num_inference_steps=NUM_STEPS, output_type="latent", callback_on_step_end=note)
    # diffusers' own grid begins and ends 0.001 higher before the shift
    assert torch.allclose(torch.tensor(steps) / 1000, scheduler.timesteps / 1000, atol=0.01)
    ours = pipe(**call, cfg_scale=GUIDANCE, output_type="pt", **grid(scheduler, NUM_STEPS))
    assert isinstance(ours, Tensor)
    assert_near(ours, expected)


def test_video_to_video_equals_diffusers(tmp_path: Path) -> None:
    from diffusers import WanVideoToVideoPipeline

    parts, video, num_steps, strength = peer_parts(16), pictures(NUM_FRAMES), 5, 0.8
    peer = WanVideoToVideoPipeline(tokenizer=None, text_encoder=None, **parts)
    peer.set_progress_bar_config(disable=True)
    expected = peer(
        video=video, height=SIZE, width=SIZE, num_inference_steps=num_steps, strength=strength,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(7), output_type="latent", **texts(),
    ).frames  # fmt: skip
    start = num_steps - int(num_steps * strength)
    latents = ours(parts, tmp_path)(
        input_video=video, height=SIZE, width=SIZE, num_frames=NUM_FRAMES, cfg_scale=GUIDANCE,
        sampler="unipc", output_type="latent",
        latents=torch.randn(LATENT_SIZE, generator=torch.Generator().manual_seed(7)),
        **grid(parts["scheduler"], num_steps, start), **texts(),
    )  # fmt: skip
    assert_near(latents, expected)

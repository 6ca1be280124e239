"""Two experts equal diffusers' WanPipeline: same weights, noise, boundary, noise levels and guidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.golden_recipe import recipe_input
from tests.parity.test_peers_images import (
    LATENT_SIZE,
    NUM_FRAMES,
    SIZE,
    assert_near,
    drawn,
    grid,
    peer_parts,
    texts,
)

NUM_STEPS = 6


def peer_pipeline(boundary: float) -> tuple[Any, dict[str, Any]]:
    from diffusers import WanPipeline

    parts = peer_parts(16)
    parts["transformer_2"] = drawn(peer_parts(16)["transformer"], 9)
    peer = WanPipeline(tokenizer=None, text_encoder=None, boundary_ratio=boundary, **parts)
    peer.set_progress_bar_config(disable=True)
    return peer, parts


def ours(parts: dict[str, Any], folder: Path, boundary: float) -> WanVideoPipeline:
    names = ("transformer_2", "transformer", "vae")  # roles are told by the folders, not by this order
    for name in names:
        parts[name].save_pretrained(folder / name)
    index = {"boundary_ratio": boundary, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    manager = ModelManager(None, "cpu").load_models([folder / name for name in names])
    return WanVideoPipeline.from_model_manager(manager)


@pytest.mark.parametrize(("high", "low"), [(4.0, 3.0), (3.5, None), (5.0, 2.0)])
@pytest.mark.parametrize("boundary", [0.875, 0.6])
def test_two_experts_equal_diffusers(boundary: float, high: float, low: float | None, tmp_path: Path) -> None:
    peer, parts = peer_pipeline(boundary)
    noise = recipe_input("noise", LATENT_SIZE)
    asked: list[str] = []
    for name in ("transformer", "transformer_2"):
        parts[name].register_forward_hook(lambda *_, name=name: asked.append(name))
    expected = peer(
        height=SIZE, width=SIZE, num_frames=NUM_FRAMES, num_inference_steps=NUM_STEPS, guidance_scale=high,
        guidance_scale_2=low, latents=noise, output_type="latent", **texts(),
    ).frames  # fmt: skip
    assert set(asked) == {"transformer", "transformer_2"}
    pipe = ours(parts, tmp_path, boundary)
    assert pipe.parts.boundary == boundary
    latents = pipe(
        height=SIZE, width=SIZE, num_frames=NUM_FRAMES, cfg_scale=high, cfg_scale_low_noise=low,
        sampler="unipc", latents=noise, output_type="latent", **texts(),
        **grid(parts["scheduler"], NUM_STEPS),
    )  # fmt: skip
    assert_near(latents, expected)

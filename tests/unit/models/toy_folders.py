"""Official folders of toy networks, and a manager of the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth.models.model_manager import ModelManager
from tests.unit.checkpoints.weights import toy_dit

DIT, TEXT_ENCODER, VAE = "wan_video_dit", "wan_video_text_encoder", "wan_video_vae"
HEADS = {"config": json.dumps({"num_heads": 3})}


def toy_text_encoder() -> nn.Module:
    from diffsynth.models.wan.text_encoder import WanTextEncoder

    sizes = {
        "vocab_size": 50,
        "dim": 24,
        "dim_attn": 24,
        "dim_ffn": 40,
        "num_heads": 3,
        "num_layers": 2,
        "num_buckets": 32,
    }
    return WanTextEncoder.from_config(sizes)


def toy_vae() -> nn.Module:
    from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE

    return WanVideoVAE(VAEConfig(dim=8, num_res_blocks=1))


def split(network: nn.Module, folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = list(network.state_dict().items())
    paths = [
        folder / f"diffusion_pytorch_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]
    for n, path in enumerate(paths):
        save_file(dict(weights[n::count]), path, metadata=HEADS)
    return paths


def write_official_folder(folder: Path) -> Path:
    """An official folder: sharded DiT, text encoder and VAE as .pth, tokenizer."""
    split(toy_dit(), folder)
    torch.save(toy_text_encoder().state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"model_state": toy_vae().state_dict()}, folder / "Wan2.1_VAE.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    return folder


def cpu(dtype: torch.dtype | None = torch.float32) -> ModelManager:
    return ModelManager(torch_dtype=dtype, device="cpu")


def all_three(folder: Path) -> tuple[list[Path], Path, Path]:
    shards = sorted(folder.glob("diffusion*"))
    return shards, folder / "models_t5_umt5-xxl-enc-bf16.pth", folder / "Wan2.1_VAE.pth"

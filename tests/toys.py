"""Checkpoints of toy networks, written as users have them: official names, the configuration beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig
from diffsynth.models.wan.text_encoder import TextEncoderConfig, WanTextEncoder
from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from tests.golden import Case
from tests.golden_recipe import recipe_state_dict


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object] | None = None
) -> Path:
    """One safetensors file; ``config`` goes into config.json in its folder, as officially."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


def load_golden_model(
    case: Case, model: str, config: Mapping[str, object], folder: Path, name: str
) -> torch.nn.Module:
    """Write a golden's weights and load them through ModelManager."""
    file = write_checkpoint(folder / model / "model.safetensors", case.weights(model), config)
    network = ModelManager(torch_dtype=None, device="cpu").load_models([file]).fetch_model(name)
    assert network is not None
    return network


def golden_pipeline(case: Case, folder: Path) -> WanVideoPipeline:
    """A pipeline of a golden's DiT (or two experts), VAE and image encoder, without text encoder."""
    files = []
    for model in case.models:
        part = model if model in ("vae", "clip") else "dit"
        subfolder = {"dit_high": "high_noise_model", "dit_low": "low_noise_model"}.get(model, model)
        files.append(
            write_checkpoint(folder / subfolder / "model.safetensors", case.weights(model), case.config[part])
        )
    manager = ModelManager(torch_dtype=None, device="cpu").load_models(files)
    return WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.float32)


TOY_DIT = DiTConfig(
    dim=48,
    in_dim=16,
    out_dim=16,
    ffn_dim=64,
    num_layers=2,
    num_heads=2,
    freq_dim=32,
    text_dim=32,
    text_len=64,
)
TOY_TEXT_ENCODER = TextEncoderConfig(
    vocab_size=640, dim=32, dim_attn=32, dim_ffn=48, num_heads=4, num_layers=1
)
TOY_VAE = VAEConfig(dim=8)
# of the toy's DiT file: what pipe() does where a test does not say
TOY_GENERATION = {
    "height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "cfg_scale": 3.0,
    "sigma_shift": 3.0, "fps": 8,
}  # fmt: skip
TOY_FILES = {"dit": "dit.safetensors", "text_encoder": "t5.safetensors", "vae": "vae.safetensors"}


def write_toy(
    path: Path,
    network: torch.nn.Module,
    config: DiTConfig | TextEncoderConfig | VAEConfig,
    seed: int = 0,
    **metadata: object,
) -> Path:
    """One file of drawn float32 weights; configuration and ``metadata`` as JSON inside, like the tiny Wan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    texts = {name: json.dumps(value) for name, value in {"config": asdict(config), **metadata}.items()}
    save_file(recipe_state_dict(shapes, seed), path, {"format": "pt", **texts})
    return path


def write_toy_dit(path: Path, seed: int = 0, config: DiTConfig = TOY_DIT, **generation: object) -> Path:
    """A toy DiT's file; ``generation`` changes the defaults it carries."""
    return write_toy(path, WanDiT(config), config, seed, generation={**TOY_GENERATION, **generation})


def write_toy_folder(folder: Path) -> Path:
    """A whole toy model: DiT, text encoder, VAE and the vocabulary of the tiny Wan."""
    write_toy_dit(folder / TOY_FILES["dit"])
    write_toy(folder / TOY_FILES["text_encoder"], WanTextEncoder(TOY_TEXT_ENCODER), TOY_TEXT_ENCODER)
    write_toy(folder / TOY_FILES["vae"], WanVideoVAE(TOY_VAE), TOY_VAE)
    vocabulary = folder / "google" / "umt5-xxl" / "spiece.model"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_bytes((tiny_folder() / "google" / "umt5-xxl" / "spiece.model").read_bytes())
    return folder

"""Write the tiny Wan as a user's files: official names, sizes and defaults in each file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.text_encoder import TextEncoderConfig
from diffsynth.models.wan.vae import LATENT_MEAN, LATENT_STD, WanVideoVAE
from diffsynth.tiny.grammar import known_words

VAE_FILE, TEXT_FILE, DIT_FILE = (
    "Wan_tiny_VAE.safetensors",
    "models_t5_tiny.safetensors",
    "diffusion_pytorch_model.safetensors",
)
GENERATION = {
    "height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "cfg_scale": 4.0,
    "sigma_shift": 3.0, "sampler": "unipc", "fps": 8,
}  # fmt: skip


@torch.no_grad()
def fold_statistics(vae: WanVideoVAE, mean: Tensor, std: Tensor) -> None:
    """Make the official mean and deviation true for this VAE's latents, exactly.

    conv1 and conv2 are 1 x 1 x 1: an affine map per channel goes into the one and its inverse into the other.

    Args:
        vae: changed in place.
        mean: (z_dim,) of the raw latents.
        std: (z_dim,) of the raw latents.
    """
    z = vae.config.z_dim
    target_mean, target_std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    gain = target_std / std
    assert vae.conv1.bias is not None and vae.conv2.bias is not None
    vae.conv1.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:z] = (vae.conv1.bias[:z] - mean) * gain + target_mean
    matrix = vae.conv2.weight.flatten(1)
    vae.conv2.bias += matrix @ (mean - target_mean / gain)
    vae.conv2.weight /= gain.view(1, -1, 1, 1, 1)


def write(network: nn.Module, path: Path, config: Mapping[str, object], **more: object) -> None:
    """bfloat16 weights; ``config`` and ``more`` as JSON in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to(torch.bfloat16).contiguous() for name, value in network.state_dict().items()
    }
    metadata = {"format": "pt", "config": json.dumps(config)}
    metadata.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in more.items()})
    save_file(tensors, path, metadata)
    path.chmod(0o644)  # safetensors makes files that only their owner reads; these go into a package


def write_vae(vae: WanVideoVAE, folder: Path) -> None:
    """The VAE's file."""
    write(vae, folder / VAE_FILE, asdict(vae.config))


def write_text_encoder(network: nn.Module, config: TextEncoderConfig, folder: Path) -> None:
    """The text encoder's file; it carries the words it was taught."""
    write(network, folder / TEXT_FILE, asdict(config), known_words=" ".join(known_words()))


def write_dit(network: WanDiT, folder: Path) -> None:
    """The DiT's file; it carries the defaults of a generation."""
    write(network, folder / DIT_FILE, asdict(network.config), generation=GENERATION)

"""Toy models: every network of a Wan model, small and untrained, to see that a script runs.

    pipe = WanVideoPipeline.from_pretrained(toy_files("i2v"), torch_dtype=torch.float32, device="cpu")

Their videos are noise. Files carry official names and their own sizes and defaults, as the tiny Wan does.
"""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from diffsynth.errors import ArgumentError
from diffsynth.models.kinds import DIT, KINDS, Sizes
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.wan.dit_config import VAE22_CHANNELS
from diffsynth.tiny import tiny_folder

TEXT_ENCODER: dict[str, object] = {
    "vocab_size": 640, "dim": 32, "dim_attn": 32, "dim_ffn": 48, "num_heads": 4, "num_layers": 1,
}  # fmt: skip
IMAGE_ENCODER: dict[str, object] = {
    "image_size": 28, "patch_size": 14, "dim": 32, "dim_ffn": 64, "num_heads": 2, "num_layers": 5,
}  # fmt: skip
GENERATION = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "cfg_scale": 3.0}
VAE: dict[str, object] = {"dim": 8}
VAE22: dict[str, object] = {"dim": 8, "dec_dim": 8}
VAE22_GENERATION = {**GENERATION, "width": 64}  # its pictures are multiples of 32
_folders: list[TemporaryDirectory[str]] = []  # removed when the program ends


def toy_files(kind: str = "t2v", seed: int = 0, *, num_layers: int = 2, num_experts: int = 1) -> list[str]:
    """Write a toy model into a folder that lives as long as the program, and return its files.

    Args:
        kind: which model; see `KINDS`.
        seed: of the weights.
        num_layers: blocks of the DiT, at least 2.
        num_experts: DiTs; two lie in the folders high_noise_model and low_noise_model.

    Raises:
        ArgumentError: for an unknown kind.
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind is {kind!r}; known: {', '.join(KINDS)}.")
    _folders.append(TemporaryDirectory(prefix="diffsynth-toy-"))
    folder = Path(_folders[-1].name)
    changed, adapters = KINDS[kind]
    sizes = {**DIT, **changed, "num_layers": num_layers}
    beside = [_network(name, own) for name, own in adapters.items()]
    has_vae22 = sizes["out_dim"] == VAE22_CHANNELS
    vae = _network("wan_video_vae", VAE22, "Wan2.2 VAE") if has_vae22 else _network("wan_video_vae", VAE)
    places = [folder] if num_experts == 1 else [folder / f"{role}_noise_model" for role in ("high", "low")]
    files = [
        *(_write(place / "dit.safetensors", [_network("wan_video_dit", sizes), *beside], seed + 1000 * i,
                 {**{key: value for own in adapters.values() for key, value in own.items()}, **sizes},
                 generation=VAE22_GENERATION if has_vae22 else GENERATION) for i, place in enumerate(places)),
        _write(folder / "t5.safetensors", [_network("wan_video_text_encoder", TEXT_ENCODER)], seed, {}),
        _write(folder / "vae.safetensors", [vae], seed, {}),
    ]  # fmt: skip
    if sizes.get("image_dim") is not None:
        encoder = _network("wan_video_image_encoder", IMAGE_ENCODER)
        told = {name: IMAGE_ENCODER[name] for name in ("image_size", "num_heads")}
        files.append(_write(folder / "clip.safetensors", [encoder], seed, told))
    words = folder / "google" / "umt5-xxl" / "spiece.model"
    words.parent.mkdir(parents=True)
    words.write_bytes((tiny_folder() / "google" / "umt5-xxl" / "spiece.model").read_bytes())
    return files


def _network(name: str, sizes: Sizes, title: str | None = None) -> nn.Module:
    """A network of the first row of this name, and of this title where several networks share the name."""
    rows = (row for row in ARCHITECTURES if row.name == name and row.module is not None)
    row = next(row for row in rows if title in (None, row.title))
    module, _, class_name = str(row.module).partition(":")
    network: nn.Module = getattr(import_module(module), class_name).from_config(sizes)
    return network


def _write(path: Path, networks: list[nn.Module], seed: int, config: Sizes, **metadata: object) -> str:
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for network in networks:
        for name, tensor in network.state_dict().items():
            drawn = torch.randn(tensor.shape, generator=generator)
            is_gain = tensor.ndim == 1 and name.endswith(("weight", "gamma"))
            scale = 0.1 if tensor.ndim < 2 else 1 / math.sqrt(max(1, tensor[0].numel()))
            weights[name] = drawn * scale + is_gain
    texts = {key: json.dumps(value) for key, value in {"config": config, **metadata}.items() if value}
    save_file(weights, path, {"format": "pt", **texts})
    return str(path)

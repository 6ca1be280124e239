"""Toy models: every network of a Wan model, small and untrained, to see that a script runs.

    pipe = WanVideoPipeline.from_pretrained(toy_files("i2v"), torch_dtype=torch.float32, device="cpu")

Their videos are noise. Files carry official names and their own sizes and defaults, as the tiny Wan does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from diffsynth.errors import ArgumentError
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.wan.dit_config import VAE22_CHANNELS
from diffsynth.tiny import tiny_folder

Sizes = Mapping[str, object]

DIT: dict[str, object] = {
    "dim": 48, "in_dim": 16, "out_dim": 16, "ffn_dim": 64, "num_layers": 2, "num_heads": 2, "freq_dim": 32,
    "text_dim": 32, "text_len": 64,
}  # fmt: skip
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
REFERENCE_ADAPTER: Sizes = {"dim": 48, "in_dim": 16, "kernel_size": (2, 2)}
CAMERA_ADAPTER: Sizes = {
    "dim": 48, "in_dim": 24, "downscale": 8, "kernel_size": (2, 2), "num_residual_blocks": 1,
}  # fmt: skip
# kind: sizes of the DiT that differ, and the adapters of its file by their name in the registry
KINDS: dict[str, tuple[Sizes, Mapping[str, Sizes]]] = {
    "t2v": ({}, {}),
    "i2v": ({"in_dim": 36, "image_dim": 32}, {}),  # Fun InP too
    "i2v-a14b": ({"in_dim": 36}, {}),
    "flf2v": ({"in_dim": 36, "image_dim": 32, "image_tokens_pos": 10}, {}),
    "control": ({"in_dim": 48, "image_dim": 32}, {}),
    "reference": (
        {"in_dim": 48, "image_dim": 32},
        {"wan_video_reference_adapter": REFERENCE_ADAPTER},
    ),
    "camera": (
        {"in_dim": 32, "image_dim": 32},
        {"wan_video_camera_adapter": CAMERA_ADAPTER},
    ),
    "vace": (
        {},
        {
            "wan_video_vace": {
                "dim": 48,
                "ffn_dim": 64,
                "num_heads": 2,
                "num_vace_blocks": 2,
                "vace_layers": (0, 1),
            }
        },
    ),
    "speed": ({}, {"wan_video_motion_controller": {"dim": 48, "freq_dim": 32}}),
    # of Wan2.2, which has no image encoder
    "control-a14b": (
        {"in_dim": 52},
        {"wan_video_reference_adapter": REFERENCE_ADAPTER},
    ),
    "camera-a14b": (
        {"in_dim": 36},
        {"wan_video_camera_adapter": CAMERA_ADAPTER},
    ),
    # with the Wan2.2 VAE
    "ti2v": ({"in_dim": VAE22_CHANNELS, "out_dim": VAE22_CHANNELS}, {}),
    "i2v-5b": ({"in_dim": 2 * VAE22_CHANNELS + 4, "out_dim": VAE22_CHANNELS}, {}),
    "control-5b": (
        {"in_dim": 3 * VAE22_CHANNELS + 4, "out_dim": VAE22_CHANNELS},
        {"wan_video_reference_adapter": {"dim": 48, "in_dim": VAE22_CHANNELS, "kernel_size": (2, 2)}},
    ),
    "camera-5b": (
        {"in_dim": 2 * VAE22_CHANNELS + 4, "out_dim": VAE22_CHANNELS},
        {
            "wan_video_camera_adapter": {
                "dim": 48,
                "in_dim": 24,
                "downscale": 16,
                "kernel_size": (2, 2),
                "num_residual_blocks": 1,
            }
        },
    ),
}

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

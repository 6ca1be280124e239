"""Toy VACE checkpoints, written as users have them: inside the DiT's file, or beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.adapters.vace import VaceAdapter, VaceConfig
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.golden_recipe import recipe_state_dict
from tests.toys import TOY_DIT, TOY_GENERATION, TOY_VAE, write_toy, write_toy_dit

TOY_VACE = VaceConfig(dim=48, ffn_dim=64, num_heads=2, num_vace_blocks=2, vace_layers=(0, 1))


def write_vace(path: Path, *, is_module_only: bool = False, seed: int = 7) -> Path:
    """One file of the toy VACE blocks, with the toy DiT or without it."""
    networks = [VaceAdapter(TOY_VACE)] if is_module_only else [WanDiT(TOY_DIT), VaceAdapter(TOY_VACE)]
    shapes = {name: tuple(t.shape) for network in networks for name, t in network.state_dict().items()}
    config = {"num_heads": TOY_VACE.num_heads}
    if not is_module_only:
        config |= {**asdict(TOY_DIT), "vace_layers": TOY_VACE.vace_layers}
    texts = {"config": json.dumps(config)}
    if not is_module_only:
        texts["generation"] = json.dumps(TOY_GENERATION)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(recipe_state_dict(shapes, seed), path, {"format": "pt", **texts})
    return path


def write_toy_speed(path: Path) -> Path:
    """A toy of the speed adapter, a file of its own."""
    shapes = {f"linear.{i}.bias": (rows,) for i, rows in ((0, 48), (2, 48), (4, 288))}
    shapes |= {f"linear.{i}.weight": (rows, n) for i, rows, n in ((0, 48, 32), (2, 48, 48), (4, 288, 48))}
    save_file(recipe_state_dict(shapes, 9), path)
    return path


def vace_pipeline(
    folder: Path, *, is_module_only: bool = False, beside: Sequence[Path] = ()
) -> WanVideoPipeline:
    """A toy VACE pipeline without text encoder; ``beside``: more files."""
    files = [*beside, write_toy(folder / "vae.safetensors", WanVideoVAE(TOY_VAE), TOY_VAE)]
    if is_module_only:
        files.append(write_toy_dit(folder / "dit.safetensors"))
    files.append(write_vace(folder / "vace" / "model.safetensors", is_module_only=is_module_only))
    return WanVideoPipeline.from_model_manager(ModelManager(torch.float32, "cpu").load_models(files))

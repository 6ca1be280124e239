"""Checkpoints of toy networks, written as users have them: official names, the configuration beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.golden import Case


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
    """A pipeline of a golden's DiT (or two experts) and VAE, without text encoder."""
    files = []
    for model in case.models:
        part = "vae" if model == "vae" else "dit"
        subfolder = {"dit_high": "high_noise_model", "dit_low": "low_noise_model"}.get(model, model)
        files.append(
            write_checkpoint(folder / subfolder / "model.safetensors", case.weights(model), case.config[part])
        )
    manager = ModelManager(torch_dtype=None, device="cpu").load_models(files)
    return WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.float32)

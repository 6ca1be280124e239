from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.toys import TOY_FILES, write_toy_dit


@pytest.fixture(scope="session")
def toy_pipe(toy_folder: Path) -> WanVideoPipeline:
    """The toy model in float32; tests leave its networks as they are."""
    return WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def two_experts(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> WanVideoPipeline:
    """The toy model with a high- and a low-noise expert of different weights."""
    folder = tmp_path_factory.mktemp("experts")
    high = write_toy_dit(folder / "high_noise_model" / "dit.safetensors", seed=1)
    low = write_toy_dit(folder / "low_noise_model" / "dit.safetensors", seed=2)
    manager = ModelManager(torch_dtype=torch.float32, device="cpu")
    manager.load_models([low, high, *(toy_folder / TOY_FILES[part] for part in ("text_encoder", "vae"))])
    return WanVideoPipeline.from_model_manager(manager)

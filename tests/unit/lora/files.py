"""LoRA files of toy sizes, in any spelling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.lora.formats import LoRA, read_loras


def drawn(*shape: int, scale: float = 0.1) -> Tensor:
    return torch.randn(shape) * scale


def pair(n: int, k: int, rank: int = 4) -> tuple[Tensor, Tensor]:
    """Down and up."""
    return drawn(rank, k), drawn(n, rank)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def read(path: Path) -> LoRA:
    [lora] = read_loras(Checkpoint.open(path))
    return lora


def comfy_file(path: Path, layers: Mapping[str, tuple[int, int]], rank: int = 4) -> Path:
    """Pairs for these layers, (N, K) each."""
    tensors = {}
    for name, (n, k) in layers.items():
        down, up = pair(n, k, rank)
        tensors |= {
            f"diffusion_model.{name}.lora_A.weight": down,
            f"diffusion_model.{name}.lora_B.weight": up,
        }
    return write(path, tensors)

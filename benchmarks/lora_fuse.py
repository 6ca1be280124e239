"""Fusing a LoRA into blocks of 14B sizes, against nothing but the matrix products that it needs.

    python benchmarks/lora_fuse.py

The peer multiplies the same factors in float32, one layer after the other, and throws each product away: it
reads no weight, adds nothing and rounds nothing. Ours is `ModelManager.load_lora`, from the LoRA's file on
disk to new weights in the network; both files are mapped and lie in the page cache.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.allocations import peak_bytes
from benchmarks.common import Row, milliseconds, parser, report, set_threads
from benchmarks.full_size import DIT_14B
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.ops.fp8 import FP8

DTYPES = {"bfloat16": torch.bfloat16, "fp8": FP8}


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", type=int, default=1)
    arguments.add_argument("--dim", type=int, default=DIT_14B["dim"])
    arguments.add_argument("--ffn-dim", type=int, default=DIT_14B["ffn_dim"])
    arguments.add_argument("--rank", type=int, default=128)
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    torch.manual_seed(0)
    sizes = {**DIT_14B, "dim": given.dim, "ffn_dim": given.ffn_dim, "num_layers": given.blocks + 2}
    rows = []
    with TemporaryDirectory() as folder:
        layers = write_dit(Path(folder) / "dit.safetensors", sizes)
        factors = write_lora(Path(folder) / "lora.safetensors", layers, given.rank)
        notes = f"{len(layers)} layers of {given.blocks} blocks of {given.dim}, rank {given.rank}"
        for name, dtype in DTYPES.items():
            manager = ModelManager(dtype, "cpu").load_models([Path(folder) / "dit.safetensors"])
            rows += measured(manager, Path(folder) / "lora.safetensors", factors, given.repeats, name, notes)
            del manager
    report("lora_fuse", rows, given.out, threads)


def write_dit(path: Path, sizes: dict[str, object]) -> dict[str, tuple[int, int]]:
    """Random bfloat16 weights; the layers of the blocks between the first and the last, as (N, K)."""
    with torch.device("meta"):
        network: nn.Module = WanDiT.from_config(sizes)
    weights = {
        name: 0.02 * torch.randn(t.shape, dtype=torch.bfloat16) for name, t in network.state_dict().items()
    }
    save_file(weights, path, {"config": json.dumps(sizes)})
    last = int(str(sizes["num_layers"])) - 1  # the first and the last block are never kept in fp8
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and name.startswith("blocks.")
        and not name.startswith(("blocks.0.", f"blocks.{last}."))
    }


def write_lora(path: Path, layers: dict[str, tuple[int, int]], rank: int) -> list[tuple[Tensor, Tensor]]:
    """Write bfloat16 factors for every layer; return them in float32, (r, K) and (N, r)."""
    keys, factors = {}, []
    for name, (n, k) in layers.items():
        down, up = (0.02 * torch.randn(shape, dtype=torch.bfloat16) for shape in ((rank, k), (n, rank)))
        keys |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        factors.append((down.float(), up.float()))
    save_file(keys, path)
    return factors


def measured(
    manager: ModelManager,
    lora: Path,
    factors: list[tuple[Tensor, Tensor]],
    repeats: int,
    kept: str,
    notes: str,
) -> list[Row]:
    """Time, turn by turn, and the most memory beside the weights when all are fused anew."""

    def products() -> None:
        for down, up in factors:
            up @ down

    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(1 + repeats):
        for name, work in (("ours", lambda: manager.load_lora(lora, name="style")), ("peer", products)):
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
        manager.unload_lora()
    per_weight = torch.finfo(DTYPES[kept]).bits // 8
    scales = 4 * sum(len(up) for _, up in factors) if kept == "fp8" else 0
    held = manager.model[0].state_dict()  # what is freed below was taken below

    def twice() -> None:
        manager.load_lora(lora, name="style")
        manager.set_lora("style", 0.5)

    fused_bytes = scales + per_weight * sum(len(up) * down.shape[1] for down, up in factors)
    extra = peak_bytes(twice) - fused_bytes
    largest = per_weight * max(len(up) * down.shape[1] for down, up in factors)
    manager.unload_lora()
    del held
    return [
        Row(
            figure=f"LoRA fused into {kept} weights", unit="ms", ours=milliseconds(seconds["ours"]),
            peer_name="bare matrix products, float32", peer=milliseconds(seconds["peer"]),
            goal="ratio >= 0.5", notes=notes,
        ),
        Row(
            figure=f"LoRA fused into {kept} weights, memory beside them", unit="MB", ours=[extra / 1e6],
            peer_name="the largest layer's weight", peer=[largest / 1e6],
            goal="one layer, and the factors in float32", notes=notes,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()

"""The predicted memory of a training step: its constants are the code's, its figures those of the issue."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.full_size import DIT_1_3B, DIT_14B
from diffsynth.errors import ArgumentError
from diffsynth.models.wan.dit import WanDiT
from diffsynth.training.memory import (
    KEPT_OF_BLOCK,
    KEPT_OF_HIDDEN,
    TrainingChoice,
    TrainingMemory,
    num_lora_parameters,
    size_of_dit,
    training_memory,
)
from diffsynth.training.tuning import TuneConfig, tune
from diffsynth.vram_management.activations import Workload
from diffsynth.vram_management.layers import layers_of_module, sizes_of
from diffsynth.vram_management.rates import DiTSizes
from tests.unit.training.toys import CONFIG, forward, toy_dit

GB = 1e9
CLIP = Workload(height=480, width=832, num_frames=81, num_branches=1)


def kept_of_a_block(kind: str, ffn_dim: int) -> float:
    """Bytes that autograd keeps of one block, in u; tokens count for all else that is small."""
    dit = toy_dit(torch.bfloat16, replace(CONFIG, ffn_dim=ffn_dim, num_layers=2))
    tune(dit, (), TuneConfig(kind=kind, rank=1))  # type: ignore[arg-type]
    kept: dict[int, Tensor] = {}
    inside = False

    def pack(tensor: Tensor) -> Tensor:
        if inside and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def run(block: nn.Module, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        nonlocal inside
        inside = block is dit.blocks[1]
        try:
            return work(x)
        finally:
            inside = False

    dit.run_block = run
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(dit, shape=(16, 9, 32, 32))
    u = 9 * 16 * 16 * CONFIG.dim * 2
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    return sum(size for size in sizes if size >= u / 2) / u


@pytest.mark.parametrize(("kind", "name"), [("lora", "factors"), ("full", "whole")])
def test_constants_are_what_autograd_keeps_of_a_block(kind: str, name: str) -> None:
    square, wide = kept_of_a_block(kind, CONFIG.dim), kept_of_a_block(kind, 2 * CONFIG.dim)
    assert wide - square == KEPT_OF_HIDDEN
    assert square == KEPT_OF_BLOCK[name] + KEPT_OF_HIDDEN


def predicted(sizes: Mapping[str, object], rank: int = 16, **choice: object) -> TrainingMemory:
    with torch.device("meta"):
        dit = WanDiT.from_config(sizes).to(torch.bfloat16)
    own = DiTSizes.from_config(sizes)
    chosen = TrainingChoice(num_trained=num_lora_parameters(own, rank), **choice)  # type: ignore[arg-type]
    return training_memory(own, sizes_of(layers_of_module("dit", dit))["dit"], CLIP, chosen)


def test_lora_parameters_are_those_of_a_tuned_toy() -> None:
    tuned = tune(toy_dit(), (), TuneConfig(rank=3))
    sizes = DiTSizes.from_config(asdict(CONFIG))
    assert tuned.num_parameters == num_lora_parameters(sizes, 3)


@pytest.mark.parametrize(
    ("sizes", "choice", "limit_gb"),
    [
        pytest.param(DIT_14B, {}, 52, id="14B"),
        pytest.param(DIT_14B, {"checkpointing": "keep_attention"}, 66, id="14B-keep-attention"),
        pytest.param(DIT_14B, {"is_offloaded": True, "num_slots": 2}, 16, id="14B-streamed-offloaded"),
        pytest.param(DIT_1_3B, {}, 12, id="1.3B"),
    ],
)
def test_predictions_stay_below_what_the_gpu_script_is_to_show(
    sizes: Mapping[str, object], choice: dict[str, object], limit_gb: float
) -> None:
    assert predicted(sizes, **choice).device / GB <= limit_gb


def test_streaming_and_offload_move_bytes_to_the_host() -> None:
    plain = predicted(DIT_14B)
    lean = predicted(DIT_14B, is_offloaded=True, num_slots=2)
    assert plain.host == 0 and plain.weights / GB == pytest.approx(28.6, abs=0.1)
    assert plain.checkpoints / GB == pytest.approx(13.4, abs=0.1)
    assert lean.host / GB == pytest.approx(28.1 + 13.4, abs=0.5)
    assert lean.block == plain.block and lean.trained == plain.trained


@pytest.mark.parametrize("sizes", [DIT_1_3B, DIT_14B], ids=["1.3B", "14B"])
def test_a_dit_weighs_by_its_sizes_what_it_weighs(sizes: Mapping[str, object]) -> None:
    guessed = size_of_dit(DiTSizes.from_config(sizes)).num_bytes
    # norms, biases, the patch embedding and the head are left out
    assert guessed == pytest.approx(predicted(sizes).weights, rel=2e-3)


def test_streaming_wants_checkpointing() -> None:
    with pytest.raises(ArgumentError, match="with gradient checkpointing alone"):
        TrainingChoice(num_trained=1, num_slots=2, checkpointing="none")


def test_arithmetic_needs_no_torch() -> None:
    code = "import sys, diffsynth.training.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

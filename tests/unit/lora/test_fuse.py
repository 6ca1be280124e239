"""Fusing costs the memory of one layer, and starts from the numbers of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.allocations import peak_bytes
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.lora import changes as changes_module
from diffsynth.lora.changes import Change, LowRank, delta
from diffsynth.lora.fuse import fuse
from diffsynth.ops import fp8 as fp8_module
from diffsynth.ops.fp8 import FP8, Fp8Linear, quantise
from tests.unit.lora.files import drawn, pair, write

N, K, RANK, LAYERS = 1024, 512, 4, 3
PIECE_BYTES = 64 << 10  # of the rows in float32 that are worked on at a time


def built(folder: Path, kept: torch.dtype, stored: torch.dtype) -> tuple[nn.Module, Checkpoint]:
    """A network of a few Linear layers, its weights kept in one dtype, and its file in another."""
    weights = {f"{i}.weight": drawn(N, K).to(stored) for i in range(LAYERS)}
    checkpoint = Checkpoint.open(write(folder / "network.safetensors", weights))
    network = nn.Sequential(*(nn.Linear(K, N, bias=False, dtype=stored) for _ in range(LAYERS)))
    for index, layer in enumerate(network):
        layer.requires_grad_(False)
        if kept == FP8:
            network[index] = Fp8Linear(layer)
        else:
            layer.to(kept)
        fuse(network, checkpoint, f"{index}.weight", ())
    return network, checkpoint


def fuse_all(network: nn.Module, checkpoint: Checkpoint, changes: Sequence[tuple[Change, float]]) -> None:
    for index in range(LAYERS):
        fuse(network, checkpoint, f"{index}.weight", changes)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_fusing_takes_the_memory_of_one_layer(
    kept: torch.dtype, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes_module, "CPU_PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(fp8_module, "CPU_PIECE_BYTES", PIECE_BYTES)
    network, checkpoint = built(tmp_path, kept, stored)
    down, up = pair(N, K, RANK)
    change = LowRank(down, up)

    held = network.state_dict()  # what is freed shall be what was counted when it was taken

    def twice() -> None:
        # the first time every weight is still the file's
        for strength in (1.0, 0.5):
            fuse_all(network, checkpoint, [(change, strength)])

    layer_bytes = N * K * kept.itemsize + (4 * N if kept == FP8 else 0)
    extra = peak_bytes(twice) - LAYERS * layer_bytes
    assert layer_bytes <= extra <= layer_bytes + 3 * PIECE_BYTES, extra / layer_bytes
    assert held.keys() == network.state_dict().keys()


def weight_of(network: nn.Module) -> Tensor:
    layer = network.get_submodule("0")
    weight = layer.widened(torch.float32) if isinstance(layer, Fp8Linear) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize("kept", [torch.bfloat16, FP8], ids=str)
def test_the_sum_is_rounded_once(kept: torch.dtype, tmp_path: Path) -> None:
    network, checkpoint = built(tmp_path, kept, torch.float32)
    down, up = pair(N, K, RANK)
    change = LowRank(down, up, 2.0)
    fuse(network, checkpoint, "0.weight", [(change, 0.7)])
    exact = checkpoint.tensor("0.weight").double()
    exact = exact + 0.7 * delta(change, exact, torch.float64)
    if kept == FP8:
        elements, scale = quantise(exact)
        largest = float((weight_of(network) - elements.float() * scale).abs().max())
        # a sum in float32 that falls on the other side of a tie: a step of e4m3, 1/16 of the row's largest
        assert largest <= float(exact.abs().max()) / 16
        share = ((weight_of(network) - elements.float() * scale).abs() > 1e-6).double().mean()
        assert share < 1e-3
    else:
        ulp = torch.finfo(kept).eps * exact.abs()
        assert ((weight_of(network).double() - exact).abs() <= 0.51 * ulp).all(), "half a step, and float32's"

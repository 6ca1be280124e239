"""LoRAs inside the weights: each weight is made anew from the checkpoint's, and never written into.

Weights may be views of the mapped file, and several networks may share it: a parameter gets new memory, and
without LoRAs stands for the file's own numbers again, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffsynth.checkpoints.build import fp8_pair
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.lora.attach import LoRALinear
from diffsynth.lora.changes import Change, changed, changed_rows
from diffsynth.ops.fp8 import FP8, Fp8Linear, quantise


def fuse(
    network: nn.Module, checkpoint: Checkpoint, name: str, changes: Sequence[tuple[Change, float]]
) -> None:
    """Let a tensor of a network be checkpoint + the sum of strength * change; just the checkpoint's for none.

    A weight kept in fp8 is quantised anew from the sum.

    Args:
        network: built from ``checkpoint``.
        checkpoint: its tensors under their official names.
        name: of the tensor.
        changes: all that are fused into it, with their strengths; they fit.

    Raises:
        CorruptCheckpointError: when the sum holds NaN or infinity and shall be kept in fp8.
    """
    holder, leaf = _holder(network, name)
    tensor = getattr(holder, leaf)
    device = tensor.device
    if isinstance(holder, Fp8Linear) and leaf == "weight":
        if changes:
            elements, scale = _quantised(_original(checkpoint, name, device), changes, name)
        else:
            elements, scale = fp8_pair(checkpoint, name, device)
        tensor.data, holder.weight_scale.data = elements, scale
    elif changes:
        tensor.data = changed(_original(checkpoint, name, device), changes, tensor.dtype)
    else:
        tensor.data = checkpoint.tensor(name, device, tensor.dtype)


def _original(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    """In the file's own dtype, on the CPU a view of it, which takes no memory; float32 if quantised."""
    is_plain = checkpoint.stored(name)[0].dtype.itemsize > 1
    return checkpoint.tensor(name, device, None if is_plain else torch.float32)


def _quantised(original: Tensor, changes: Sequence[tuple[Change, float]], name: str) -> tuple[Tensor, Tensor]:
    """As `quantise`, some rows at a time: the sum is never there as a whole in float32."""
    elements = torch.empty(original.shape, dtype=FP8, device=original.device)
    scale = torch.empty(len(original), 1, device=original.device)
    for where, rows in changed_rows(original, changes):
        elements[where], scale[where] = quantise(rows, name)
    return elements, scale


def original_tensor(network: nn.Module, checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor without any LoRA, in float32, where the network has it."""
    holder, leaf = _holder(network, name)
    return checkpoint.tensor(name, getattr(holder, leaf).device, torch.float32)


def _holder(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name there, whatever is attached to it."""
    parent, _, leaf = name.rpartition(".")
    module = network.get_submodule(parent)
    if isinstance(module, LoRALinear):
        module = module.base
    if parametrize.is_parametrized(module, leaf):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        return lists[leaf], "original"
    return module, leaf

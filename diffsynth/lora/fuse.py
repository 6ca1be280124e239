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
from diffsynth.lora.changes import Change, changed
from diffsynth.ops.fp8 import Fp8Linear, quantise


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
            wide = checkpoint.tensor(name, device, torch.float32)
            elements, scale = quantise(changed(wide, changes, torch.float32), name)
        else:
            elements, scale = fp8_pair(checkpoint, name, device)
        tensor.data, holder.weight_scale.data = elements, scale
        return
    original = checkpoint.tensor(name, device, tensor.dtype)
    tensor.data = changed(original, changes, tensor.dtype) if changes else original


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

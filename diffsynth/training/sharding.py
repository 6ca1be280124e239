"""FSDP2: weights cut into shards, one per rank, and put together again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffsynth.errors import ArgumentError
from diffsynth.ops.fp8 import Fp8Linear

T = TypeVar("T")
STACKS = ("dit.blocks.", "vace_blocks.")


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network, in place, over the ranks of a mesh.

    Every Linear layer of the blocks is gathered for its own turn; the rest (norms, modulation, embeddings,
    trained factors) belongs to the network as a whole and is gathered for the whole pass. Not whole blocks:
    keys and values of the text are made outside of a block's forward.

    Args:
        network: answers through its ``forward`` alone.
        mesh: of one dimension.

    Raises:
        ArgumentError: for weights in fp8.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, Fp8Linear):
            raise ArgumentError(
                f"{name} is kept in fp8, which FSDP2 does not shard: set model.dtype to bfloat16, or "
                "run.strategy to ddp."
            )
    layers = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and any(stack in f"{name}." for stack in STACKS)
    ]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on this rank; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_cpu(value: Any, *, keeps: bool = True) -> Any:
    """Tensors of a nested state whole and on the CPU, each with memory of its own.

    Every rank must ask for what is in shards; one that does not keep it gets empty tensors.
    """
    if isinstance(value, Tensor):
        whole = full(value.detach())
        whole = whole.cpu() if keeps else whole.new_empty(0, device="cpu")
        return whole.clone() if whole.untyped_storage().nbytes() != whole.nbytes else whole
    if isinstance(value, dict):
        return {key: on_cpu(one, keeps=keeps) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(one, keeps=keeps) for one in value)
    return value


def like(model: Tensor, value: T) -> T:
    """A whole tensor cut as ``model`` is; anything else as it is."""
    if isinstance(model, DTensor) and isinstance(value, Tensor) and value.shape == model.shape:
        whole = value.to(model.device) if value.device != model.device else value
        return distribute_tensor(whole, model.device_mesh, model.placements)  # type: ignore[return-value]
    return value


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts of it."""
    return isinstance(tensor, DTensor)

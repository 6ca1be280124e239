"""Tensors as the memory plan sees them: names, counts and dtypes; from a header, or from a network in memory.

Nothing here imports torch: modules are read by the methods that they have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from diffsynth.errors import ArgumentError

GIB = 2**30
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
SPELLINGS = {  # of torch, as headers write them
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}  # fmt: skip
ALIGNMENT = 256  # bytes; each tensor of a block begins at a multiple of it in the block's flat buffer
BLOCK = re.compile(r"(?:(?:vace_)?blocks|visual\.transformer)\.(\d+)\.(.+)")
# What makes the keys and values of a block's cross-attention, and serves nothing else.
KEY_LAYER = re.compile(r"cross_attn\.(?:k|v|norm_k|k_img|v_img|norm_k_img)\.")
NO_LINEAR = re.compile(r"embedding|modulation|norm")  # two-dimensional in a block, and no Linear's weight
FP8_EDGE_BLOCKS = {"dit": 1, "dit_low_noise": 1}  # at either end that stay wide: fp8_policy of the networks
HOST_TABLES = ("token_embedding.weight",)  # some rows are looked up on the host while the network is streamed


class TensorLike(Protocol):
    """What is read of a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> object: ...


class ModuleLike(Protocol):
    """What is read of a network."""

    def named_parameters(self) -> Iterator[tuple[str, TensorLike]]: ...

    def named_buffers(self) -> Iterator[tuple[str, TensorLike]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One tensor of one network."""

    network: str  # a name of `PipelineComponents.networks`: "dit", "dit_low_noise", "text_encoder", "vae"
    name: str  # official: "blocks.3.ffn.0.weight"
    num_parameters: int
    dtype: str  # as in a header: "BF16", "F32", "F8_E4M3"
    is_matrix: bool  # weight of a Linear layer in a block: what fp8 storage applies to
    is_mapped: bool = True  # can stay in its file until it is needed; False: converted, in plain memory

    @property
    def num_bytes(self) -> int:
        """As it is stored."""
        return self.num_parameters * DTYPE_BYTES[self.dtype]


def layers_of_shapes(
    network: str,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, str],
    *,
    stored_dtype: str | None = None,
) -> list[LayerSpec]:
    """Read a header.

    Args:
        network: under which name it stands in a pipeline.
        shapes: of every tensor, under official names.
        dtypes: of every tensor, as in the header.
        stored_dtype: what weights are loaded as: "BF16", "F16", "F32"; "F8_E4M3" for the matrices of blocks,
            and bfloat16 for all else; None keeps the file's.

    Raises:
        ArgumentError: for a dtype whose size is not known.
    """
    found = []
    edges = _edge_blocks(network, shapes)
    for name, shape in shapes.items():
        is_matrix = _is_matrix(name, len(shape)) and not name.startswith(edges)
        stored = _stored(dtypes[name], stored_dtype, is_matrix=is_matrix)
        if stored not in DTYPE_BYTES:
            raise ArgumentError(f"{name} is {stored}; known dtypes: {', '.join(DTYPE_BYTES)}.")
        found.append(
            LayerSpec(
                network=network, name=name, num_parameters=prod(shape), dtype=stored, is_matrix=is_matrix,
                is_mapped=stored == dtypes[name],
            )
        )  # fmt: skip
        if stored != dtypes[name] and stored.startswith("F8_"):
            # a scale for each row
            scale = replace(found[-1], name=f"{name}_scale", num_parameters=shape[0], dtype="F32")
            found.append(replace(scale, is_matrix=False))
    return found


def layers_of_module(network: str, module: ModuleLike) -> list[LayerSpec]:
    """Read a network as it is in memory, parameters and buffers.

    Raises:
        ArgumentError: for a dtype whose size is not known.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return layers_of_shapes(
        network,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: SPELLINGS.get(dtype, dtype) for name, dtype in dtypes.items()},
    )


def _edge_blocks(network: str, names: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of names in the first and last blocks, where those stay wide."""
    count = FP8_EDGE_BLOCKS.get(network, 0)
    num_blocks = 1 + max((int(m.group(1)) for name in names if (m := BLOCK.fullmatch(name))), default=-1)
    return tuple(f"blocks.{i}." for i in range(num_blocks) if not count <= i < num_blocks - count)


def _is_matrix(name: str, num_dims: int) -> bool:
    found = BLOCK.fullmatch(name)
    return (
        num_dims == 2
        and found is not None
        and name.endswith(".weight")
        and NO_LINEAR.search(found.group(2)) is None
    )


def _stored(dtype: str, wanted: str | None, *, is_matrix: bool) -> str:
    if wanted is None or not dtype.startswith(("F", "BF")):
        return dtype
    if wanted.startswith("F8_"):
        if is_matrix:
            return dtype if dtype.startswith("F8_") else wanted
        return "BF16"
    return wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSize:
    """One block of a network."""

    num_parameters: int = 0
    num_bytes: int = 0
    slot_bytes: int = 0  # as one flat buffer, each tensor aligned
    key_bytes: int = 0  # of it: what need not travel once the keys of cross-attention are kept
    fp8_parameters: int = 0  # of its matrices that are stored in fp8


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSize:
    """A network, added up."""

    name: str
    num_parameters: int
    num_bytes: int
    unmapped_bytes: int  # of it: in plain memory while the network rests
    blocks: tuple[BlockSize, ...]  # empty: it has none that can be streamed
    rest_parameters: int  # outside of blocks
    rest_bytes: int
    table_bytes: int  # of the rest: stays on the host while the network is streamed
    fp8_parameters: int  # of the largest matrix in fp8

    @property
    def block_bytes(self) -> int:
        """All blocks."""
        return sum(block.num_bytes for block in self.blocks)

    def widened_parameters(self, device: str) -> int:
        """What is widened from fp8 at a time: a matrix, just before its use; on a CPU those of a block."""
        if device != "cpu":
            return self.fp8_parameters
        return max((block.fp8_parameters for block in self.blocks), default=0)


def sizes_of(layers: Iterable[LayerSpec]) -> dict[str, NetworkSize]:
    """Add up tensors, network by network.

    Raises:
        ArgumentError: when blocks of a network are not numbered from 0 on.
    """
    by_network: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        by_network.setdefault(layer.network, []).append(layer)
    return {name: _size(name, own) for name, own in by_network.items()}


def _size(name: str, layers: list[LayerSpec]) -> NetworkSize:
    blocks: dict[int, list[tuple[LayerSpec, str]]] = {}
    rest: list[LayerSpec] = []
    for layer in layers:
        found = BLOCK.fullmatch(layer.name)
        if found is None:
            rest.append(layer)
            continue
        blocks.setdefault(int(found.group(1)), []).append((layer, found.group(2)))
    if sorted(blocks) != list(range(len(blocks))):
        raise ArgumentError(f"{name} has blocks {sorted(blocks)}; expected 0 to {len(blocks) - 1}.")
    return NetworkSize(
        name=name,
        num_parameters=sum(layer.num_parameters for layer in layers),
        num_bytes=sum(layer.num_bytes for layer in layers),
        unmapped_bytes=sum(layer.num_bytes for layer in layers if not layer.is_mapped),
        blocks=tuple(_block(blocks[index]) for index in sorted(blocks)),
        rest_parameters=sum(layer.num_parameters for layer in rest),
        rest_bytes=sum(layer.num_bytes for layer in rest),
        table_bytes=sum(layer.num_bytes for layer in rest if layer.name in HOST_TABLES),
        fp8_parameters=max(
            (layer.num_parameters for layer in layers if layer.is_matrix and layer.dtype.startswith("F8_")),
            default=0,
        ),
    )


def _block(layers: list[tuple[LayerSpec, str]]) -> BlockSize:
    """Add up the tensors of a block, each with its name inside it."""
    aligned = [(name, -(-layer.num_bytes // ALIGNMENT) * ALIGNMENT) for layer, name in layers]
    fp8 = [layer for layer, _ in layers if layer.is_matrix and layer.dtype.startswith("F8_")]
    return BlockSize(
        num_parameters=sum(layer.num_parameters for layer, _ in layers),
        num_bytes=sum(layer.num_bytes for layer, _ in layers),
        slot_bytes=sum(size for _, size in aligned),
        key_bytes=sum(size for name, size in aligned if KEY_LAYER.match(name)),
        fp8_parameters=sum(layer.num_parameters for layer in fp8),
    )

"""A block's tensors as one run of bytes: what travels in one copy, and is looked at through views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsynth.vram_management.copiers import FlatSource, ScatteredSource
from diffsynth.vram_management.host_memory import is_locked

ALIGNMENT = 256  # bytes; what kernels like, and more than any dtype needs
CACHE_LINE = 64  # bytes; where torch begins memory on a CPU


@dataclass(frozen=True, slots=True)
class _Piece:
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, buffer: Tensor) -> Tensor:
        """This tensor, inside a buffer that holds the block."""
        return buffer[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


class FlatLayout:
    """Where each tensor of a block lies in its run of bytes.

    Layers that make the keys of cross-attention (the block names them in ``key_layers``) stand at the end:
    once the keys are kept, the run is cut before them.

    Args:
        block: its parameters and buffers are what travels; not those that train.
        keeps_phase: begin each tensor as far behind a cache line as it does now. A CPU's kernels may sum in
            another order on memory that begins elsewhere; tensors of a mapped file begin anywhere.
    """

    def __init__(self, block: nn.Module, *, keeps_phase: bool = False) -> None:
        key_layers: Sequence[str] = getattr(block, "key_layers", ())
        named = resting_tensors(block)
        named.sort(key=lambda item: item[0].startswith(tuple(key_layers)))  # stable: the rest keeps its order
        self.tensors: list[Tensor] = [tensor for _, tensor in named]
        self._pieces: list[_Piece] = []
        end = self.bytes_without_keys = 0
        for name, tensor in named:
            size = tensor.numel() * tensor.element_size()
            phase = tensor.data_ptr() % CACHE_LINE if keeps_phase else 0
            self._pieces.append(_Piece(end + phase, size, tensor.dtype, tensor.shape))
            end += -(-(phase + size) // ALIGNMENT) * ALIGNMENT
            if not name.startswith(tuple(key_layers)):
                self.bytes_without_keys = end
        self.num_bytes = end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors, in the order of ``tensors``, inside a buffer that holds the block: (n,) uint8."""
        return [piece.view(buffer) for piece in self._pieces]

    def scattered(self) -> ScatteredSource:
        """The tensors where they lie now."""
        return ScatteredSource(
            [
                (piece.offset, tensor.data.contiguous().view(torch.uint8).flatten())
                for piece, tensor in zip(self._pieces, self.tensors, strict=True)
                if tensor.numel()
            ]
        )

    def home(self) -> FlatSource | None:
        """The page-locked buffer that holds the tensors at their places already; None when there is none."""
        if not self.tensors or not is_locked(self.tensors[0]):
            return None
        buffer = torch.empty(0, dtype=torch.uint8).set_(self.tensors[0].untyped_storage())
        if buffer.numel() != self.num_bytes:
            return None
        starts = (buffer.data_ptr() + piece.offset for piece in self._pieces)
        lies = all(t.data_ptr() == start for t, start in zip(self.tensors, starts, strict=True))
        return FlatSource(buffer) if lies else None

    def gather(self, into: FlatSource) -> None:
        """Fill a buffer with the tensors and let them rest there: the memory they had is let go."""
        self.scattered().read_into(into.buffer, 0, self.num_bytes)
        bind(self.tensors, self.views(into.buffer))


def resting_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that rest and travel: all but those that train, which stay where they are."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor) for name, tensor in named if not tensor.requires_grad]


def bind(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let each tensor stand for other memory; the objects, and all who hold them, stay."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data = value

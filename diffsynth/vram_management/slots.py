"""What a stream keeps account of: blocks that travel, and the room that they travel into."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from diffsynth.vram_management.copiers import Mark, Source, Transfer
from diffsynth.vram_management.flat import FlatLayout


@dataclass
class StreamCounts:
    """What a stream has done, for tests and reports."""

    copies: int = 0
    bytes: int = 0
    slots_made: int = 0


@dataclass
class StreamedBlock:
    """A block that travels."""

    module: nn.Module
    layout: FlatLayout
    source: Source
    resting: list[Tensor]  # what its tensors stand for between two turns
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by slot


@dataclass
class Slot:
    """Room for one block on the device."""

    buffer: Tensor
    free: Mark
    block: int | None = None
    num_bytes: int = 0  # of the block that are here or on their way
    transfers: list[Transfer] = field(default_factory=list)
    is_given: bool = False  # another stream has taken it over

"""What a plan says: about a network, about a phase, about the whole generation. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Where = Literal["resident", "visits", "streamed"]
Host = Literal["pinned", "ring", "pageable"]
Verdict = Literal["resident", "compute-bound", "copy-bound"]


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """What happens to one network."""

    network: str
    where: Where  # stays on the device; comes for its phase as a whole; its blocks are streamed in its phase
    num_blocks: int = 0  # 0: it has none that could be streamed
    resident_blocks: tuple[int, ...] = ()  # of a streamed network: those that stay for its phase
    num_slots: int = 0  # of a streamed network: 2 or 3
    host: Host = "pageable"  # of a streamed network: where its blocks rest
    num_parameters: int = 0
    weight_bytes: int = 0  # all of it
    device_bytes: int = 0  # of its weights in its phase, slots included
    streamed_bytes: int = 0  # that travel each time the blocks are walked through
    pinned_bytes: int = 0  # of the host
    pageable_bytes: int = (
        0  # of the host, in plain memory: converted weights; blocks where the device is the CPU
    )
    mapped_bytes: int = 0  # in the file, which the system caches as it likes
    locked_bytes: int = (
        0  # of those two: in pinned memory too, from its second visit on, where the host has room
    )
    is_of_pair: bool = False  # of two experts: what comes for the later one takes over the earlier one's room


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """The fullest moment of one phase, in pieces; host bytes are those of the networks of the phase."""

    name: str  # "text", "image", "audio", "encode", "dit", "dit_low_noise", "vae"
    networks: tuple[str, ...]
    weight_bytes: int  # with those of networks that only stay
    slot_bytes: int
    activation_bytes: int
    key_bytes: int  # of cross-attention, kept for the generation
    workspace_bytes: int  # of libraries
    pinned_bytes: int = 0
    pageable_bytes: int = 0
    mapped_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would show."""
        working = self.activation_bytes + self.key_bytes + self.workspace_bytes
        return self.weight_bytes + self.slot_bytes + working


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a generation takes, and how it is arranged."""

    networks: Mapping[str, NetworkPlan]
    phases: tuple[PhasePlan, ...]
    interleaves_branches: bool  # both sides of the guidance in one residency of each block
    keeps_keys: (
        bool  # keys and values of text and image are kept: their weights travel in the first step only
    )
    ffn_chunk_tokens: int | None  # None: the network's own default
    tiled_vae: bool  # to decode
    tiled_encode: bool
    copy_s: float  # per denoising step, from the second on
    compute_s: float
    verdict: Verdict
    reserve_bytes: int  # of the device, beyond the peak
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Of the fullest phase."""
        return max((phase.peak_bytes for phase in self.phases), default=0)

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is locked for the device."""
        return sum(network.pinned_bytes for network in self.networks.values())

    @property
    def pageable_bytes(self) -> int:
        """Host memory in plain form."""
        return sum(network.pageable_bytes for network in self.networks.values())

    @property
    def mapped_bytes(self) -> int:
        """Weights that stay in their files."""
        return sum(network.mapped_bytes for network in self.networks.values())

    @property
    def locked_bytes(self) -> int:
        """Of those two: what comes as a whole and is pinned as well when it has come a second time."""
        return sum(network.locked_bytes for network in self.networks.values())

"""Where the networks are while they train: on the device, sharded over ranks, or streamed from the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from diffsynth.training.config import MemoryConfig
from diffsynth.training.offload import CheckpointOffload
from diffsynth.training.recompute import Recompute, StreamedBase, compile_blocks
from diffsynth.training.sharding import shard

if TYPE_CHECKING:
    from diffsynth.training.learners import Learner


class Placing:
    """Puts learners where they train, and back.

    Args:
        memory: what is traded for memory.
    """

    def __init__(self, memory: MemoryConfig) -> None:
        self._memory = memory
        self._recomputes: list[Recompute] = []
        self._streams: list[StreamedBase] = []

    def enter(self, learners: Sequence[Learner], device: torch.device, mesh: DeviceMesh | None) -> None:
        """Bring the networks to ``device``; with a ``mesh`` each rank keeps a shard."""
        for learner in learners:
            networks = [learner.denoiser.dit, *learner.denoiser.adapters]
            if mesh is not None:
                shard(learner.denoiser, mesh)
            elif self._memory.stream:
                learner.tuned.to(device)
                self._streams.append(StreamedBase(networks, device))
            else:
                learner.denoiser.to(device)
            self._recompute(networks, self._streams[-1] if self._memory.stream else None, device)
            if self._memory.compile:
                compile_blocks(networks)

    def leave(self) -> None:
        """Plain networks again; streamed ones on the host."""
        for recompute in self._recomputes:
            recompute.remove()
        for stream in self._streams:
            stream.close()
        self._recomputes.clear()
        self._streams.clear()

    def _recompute(
        self, networks: Sequence[nn.Module], stream: StreamedBase | None, device: torch.device
    ) -> None:
        mode = self._memory.gradient_checkpointing
        if mode == "none":
            return
        recompute = Recompute(
            mode,
            offload=CheckpointOffload() if self._memory.offload else None,
            bring_back=None if stream is None else stream.bring_back,
        )
        recompute.install(networks)
        self._recomputes.append(recompute)

"""Where the networks are while they train: on the device, sharded over ranks, or streamed from the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from diffsynth.training.config import MemoryConfig
from diffsynth.training.offload import CheckpointOffload
from diffsynth.training.recompute import Recompute, StreamedBase, compile_blocks
from diffsynth.training.resting import Resting
from diffsynth.training.sharding import shard

if TYPE_CHECKING:
    from diffsynth.training.learners import Learner


class Placing:
    """Puts learners where they train, and back.

    Args:
        memory: what is traded for memory.
        folder: of the run, where weights may rest on disk.
    """

    def __init__(self, memory: MemoryConfig, folder: Path) -> None:
        self._memory, self._folder = memory, folder
        self._resting: Resting | None = None
        self._learners: list[Learner] = []
        self._recomputes: list[Recompute] = []
        self._streams: list[StreamedBase] = []

    def enter(self, learners: Sequence[Learner], device: torch.device, mesh: DeviceMesh | None) -> None:
        """Bring the networks to ``device``; with a ``mesh`` each rank keeps a shard."""
        self._learners = list(learners)
        rests = mesh is None and not self._memory.stream and self._memory.idle_expert != "device"
        if rests and len(learners) > 1:
            for learner in learners:
                learner.tuned.to(device)
            experts = [_networks(learner) for learner in learners]
            self._resting = Resting(experts, device, self._memory.idle_expert, self._folder)
        for learner in learners:
            networks = _networks(learner)
            if mesh is not None:
                shard(learner.denoiser, mesh)
            elif self._memory.stream:
                learner.tuned.to(device)
                self._streams.append(StreamedBase(networks, device))
            elif self._resting is None:
                learner.denoiser.to(device)
            self._recompute(networks, self._streams[-1] if self._memory.stream else None, device)
            if self._memory.compile:
                compile_blocks(networks)

    def use(self, learner: Learner) -> None:
        """This one computes next; the others rest, where they do."""
        if self._resting is not None:
            self._resting.bring_in(next(i for i, one in enumerate(self._learners) if one is learner))

    def rest(self) -> None:
        """Others compute next, who bring networks in by themselves."""
        if self._resting is not None:
            self._resting.bring_in(None)

    def leave(self) -> None:
        """Plain networks again; streamed ones, and those of two experts, on the host."""
        self.rest()
        self._resting = None
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


def _networks(learner: Learner) -> list[nn.Module]:
    return [learner.denoiser.dit, *learner.denoiser.adapters]

"""Step caches, and steps to ask them at."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffsynth.models.wan.probe import Probe
from diffsynth.sampling.step import Step


def step(index: int = 0, count: int = 1, timestep: float = 500.0) -> Step:
    return Step(index=index, count=count, sigma=timestep / 1000, timestep=torch.tensor([timestep]))


class NoCache:
    """Answers nothing."""

    def begin(self, count: int, sides: int) -> None:
        pass

    def answer(self, step: Step, side: int, latents: Tensor) -> Tensor | None:
        return None

    def recall(self, step: Step, side: int, probe: Probe) -> Tensor | None:
        return None

    def keep(
        self, step: Step, side: int, *, change: Tensor | None = None, velocity: Tensor | None = None
    ) -> None:
        pass

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


class EverySecondStep(NoCache):
    """Lets the network answer at even steps, and answers at odd ones as it did: its blocks, or all of it."""

    def __init__(self, *, of_blocks: bool) -> None:
        self._of_blocks = of_blocks
        self.kept: dict[tuple[str, int], Tensor] = {}
        self.asked: list[tuple[int, str, int]] = []
        self.begun: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        return f"EverySecondStep(of_blocks={self._of_blocks})"

    def begin(self, count: int, sides: int) -> None:
        self.begun.append((count, sides))
        self.kept.clear()

    def answer(self, step: Step, side: int, latents: Tensor) -> Tensor | None:
        self.asked.append((step.index, step.expert, side))
        return None if self._of_blocks or step.index % 2 == 0 else self.kept.get((step.expert, side))

    def recall(self, step: Step, side: int, probe: Probe) -> Tensor | None:
        assert probe.time.shape == (probe.x.shape[0], probe.x.shape[2])
        assert probe.modulation.shape == (probe.x.shape[0], 6, probe.x.shape[2])
        return self.kept.get((step.expert, side)) if self._of_blocks and step.index % 2 else None

    def keep(
        self, step: Step, side: int, *, change: Tensor | None = None, velocity: Tensor | None = None
    ) -> None:
        value = change if self._of_blocks else velocity
        if value is not None:
            self.kept[step.expert, side] = value

    def state(self) -> Mapping[str, Tensor]:
        return {f"{expert} {side}": value for (expert, side), value in self.kept.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            expert, side = name.split()
            self.kept[expert, int(side)] = value

"""A run that can be cut off at any moment: state written whole or not at all, every few minutes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_CLOCK_EVERY_S = 20.0


def save_whole(state: dict[str, object], path: Path) -> None:
    """Write beside the target, then rename: a cut leaves the state before, never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


class Run:
    """Steps, weights, their moving average and the optimizer's state of one training run.

    Args:
        path: where the state lies; a run that finds it goes on from there.
        networks: what is trained, by name.
        optimizer: holds the parameters of ``networks``.
        ema: share of the moving average that one step keeps.
    """

    def __init__(
        self, path: Path, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, ema: float = 0.998
    ) -> None:
        self.path, self.networks, self.optimizer, self.decay = path, networks, optimizer, ema
        self.step = 0
        self.average = {name: _copy(net) for name, net in networks.items()}
        self._saved_at = time.monotonic()
        if path.exists():
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.step, self.average = state["step"], state["average"]
            for name, net in networks.items():
                net.load_state_dict(state["networks"][name])
            optimizer.load_state_dict(state["optimizer"])

    def advance(self, say: Callable[[str], None], *, every_s: float = 120.0) -> None:
        """Count one step, move the average, save when the last save is ``every_s`` seconds old."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, net in self.networks.items():
                for key, value in net.state_dict().items():
                    self.average[name][key].lerp_(value, 1 - decay)
        if time.monotonic() - self._saved_at > every_s:
            self.save()
            say(f"saved at step {self.step}")

    def save(self) -> None:
        """Write the state now."""
        networks = {name: net.state_dict() for name, net in self.networks.items()}
        state = {"step": self.step, "networks": networks, "average": self.average}
        save_whole({**state, "optimizer": self.optimizer.state_dict()}, self.path)
        self._saved_at = time.monotonic()


class Clock:
    """Wall-clock time that a run has used, over all its starts."""

    def __init__(self, path: Path, minutes: float) -> None:
        self._path, self._budget_s = path, minutes * 60
        self._used_s = float(path.read_text()) if path.exists() else 0.0
        self._started = self._saved_at = time.monotonic()

    def progress(self) -> float:
        """Share of the minutes that is used, from 0."""
        return (self._used_s + time.monotonic() - self._started) / self._budget_s

    def save(self) -> None:
        """Note the time now and then."""
        if time.monotonic() - self._saved_at > SAVE_CLOCK_EVERY_S:
            self._saved_at = time.monotonic()
            self._path.write_text(str(self.progress() * self._budget_s))


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def cosine(progress: float, *, warmup: float = 0.01, floor: float = 0.02) -> float:
    """Factor of the learning rate at ``progress`` (0..1) of the run: short rise, then half a cosine down."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    turn = torch.pi * min((progress - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + float(torch.cos(torch.tensor(turn))))

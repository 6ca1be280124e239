"""What learns: an expert with what trains of it, as one module that a strategy wraps or shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffsynth.checkpoints.hints import Role
from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Expert
from diffsynth.training.config import OptimizerConfig
from diffsynth.training.optimizers import make_optimizer
from diffsynth.training.sharding import on_cpu
from diffsynth.training.tuning import WITH_FACTORS, Tuned


class Denoiser(nn.Module):
    """A DiT with its adapters, from conditions to velocity in one call: what a strategy wraps or shards."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.dit = expert.dit
        self.adapters = nn.ModuleList(expert.adapters)

    def forward(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Velocity (B, C, F, H, W) float32."""
        branch = self.dit.prepare(conditions, cast("Any", tuple(self.adapters)))
        return self.dit(latents, timestep, [branch])[0]  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class Learner:
    """One expert, what of it is trained, and the timesteps at which it answers."""

    denoiser: Denoiser
    tuned: Tuned
    low: float = 0.0  # lowest timestep, 0 to 1000
    high: float = 1000.0
    share: float = 1.0  # of the turns, against those of the others
    learning_rate: float = 1e-4  # at its highest
    role: Role | None = None  # of a pair of experts, which
    prefix: str = ""  # before the names of its tensors in a checkpoint

    def __post_init__(self) -> None:
        wanted = {id(p): name for name, p in self.tuned.parameters().items()}
        self._places = {
            wanted[id(p)]: (module, leaf)
            for module in self.denoiser.modules()
            for leaf, p in module._parameters.items()
            if id(p) in wanted
        }
        assert set(self._places) == set(wanted.values())
        self._names = list(wanted.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, as it stands in the network now: sharding puts other objects there."""
        found = {name: self._places[name][0]._parameters[self._places[name][1]] for name in self._names}
        return cast("dict[str, nn.Parameter]", found)

    def make_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """For what trains, or for what stands in for it under stochastic rounding."""
        rounding = self.tuned.rounding
        stepped = self.parameters() if rounding is None else rounding.parameters()
        return make_optimizer(stepped.values(), replace(config, learning_rate=self.learning_rate))

    @contextmanager
    def whole(self, *, keeps: bool = True) -> Iterator[None]:
        """Shards are put together inside, for a file to be written; all ranks enter, writers keep them."""
        with_factors = self.tuned.config.kind in WITH_FACTORS
        places = self._places.values() if with_factors else [
            (module, leaf) for module in self.denoiser.modules() for leaf in module._parameters
        ]  # fmt: skip
        kept = [(m, leaf, p) for m, leaf in places if isinstance(p := m._parameters[leaf], DTensor)]
        for module, leaf, parameter in kept:
            assert parameter is not None
            module._parameters[leaf] = nn.Parameter(on_cpu(parameter, keeps=keeps), requires_grad=False)
        try:
            yield
        finally:
            for module, leaf, parameter in kept:
                module._parameters[leaf] = parameter

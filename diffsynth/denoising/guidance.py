"""Guidance: what the prompt pulls towards, and what it is kept away from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Experts, Side
from diffsynth.errors import ArgumentError
from diffsynth.sampling.step import Step


@dataclass(frozen=True, kw_only=True, eq=False)
class Guided:
    """One side of the guidance, with its share in the velocity."""

    conditions: Conditions
    weight: Callable[[Step], float]  # 0: it is not asked
    skips: frozenset[int] = frozenset()  # blocks that it leaves out (skip-layer guidance)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly the prompt pulls, by expert."""

    high: float  # of the high-noise expert, or the only one
    low: float

    def scale(self, step: Step) -> float:
        """Of the expert that answers."""
        return self.high if step.expert == "high" else self.low


def classifier_free(positive: Conditions, negative: Conditions, guidance: Guidance) -> tuple[Guided, Guided]:
    """Negative + scale (positive - negative)."""
    return (
        Guided(conditions=positive, weight=guidance.scale),
        Guided(conditions=negative, weight=lambda step: 1.0 - guidance.scale(step)),
    )


def guided(experts: Experts, latents: Tensor, step: Step, branches: Sequence[Guided]) -> Tensor:
    """The velocity of a step, (B, C, F, H, W) float32: the sum of weight x side.

    Raises:
        ArgumentError: when no side has a weight.
    """
    weights = {index: branch.weight(step) for index, branch in enumerate(branches)}
    asked = [index for index, weight in weights.items() if weight != 0.0]
    if not asked:
        raise ArgumentError(f"All sides of the guidance weigh 0 at step {step.index + 1}; give one a weight.")
    sides = [
        Side(index=index, conditions=branches[index].conditions, skips=branches[index].skips)
        for index in asked
    ]
    velocities = experts(latents, step, sides)
    if len(asked) == 2 and math.isclose(weights[asked[0]] + weights[asked[1]], 1.0, rel_tol=0, abs_tol=1e-9):
        toward, away = velocities
        return away.lerp(toward, weights[asked[0]])  # rounds once where a sum rounds twice
    # Never in place: a step cache may hold what it was told and what it answers.
    total = velocities[0] if weights[asked[0]] == 1.0 else velocities[0] * weights[asked[0]]
    for index, velocity in zip(asked[1:], velocities[1:], strict=True):
        total = total.add(velocity, alpha=weights[index])
    return total

"""Who answers at a noise level: one DiT, or two that share the range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.step_cache import StepCache
from diffsynth.errors import ArgumentError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.dit import Branch, Memories, WanDiT
from diffsynth.sampling.step import ExpertName, Step


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A DiT with its adapters."""

    dit: WanDiT
    adapters: tuple[DiTAdapter, ...] = ()
    networks: tuple[str, ...] = ("dit",)  # the names under which these come to the device
    call: Callable[..., list[Tensor]] | None = None  # in place of the DiT's: what torch.compile made of it


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One side of the guidance, as experts are asked for it."""

    index: int  # names its memory
    conditions: Conditions
    skips: frozenset[int] = frozenset()  # blocks that are left out


@dataclass(eq=False)
class _Prepared:
    """What an expert keeps between the steps."""

    branches: dict[int, tuple[Side, Branch]] = field(default_factory=dict)  # by side
    memories: Memories = field(default_factory=dict)


class Experts:
    """One or two experts, for one generation; keeps one branch per expert and side of the guidance.

    Args:
        high: answers at high noise, or everywhere when there is no ``low``.
        low: answers where the timestep is below the boundary.
        boundary: share of 1000; 0.875 for Wan2.2 T2V, 0.900 for I2V.
        step_cache: may answer instead of the network, or of its blocks.
        bring_in: is told, before an expert answers, which networks it needs on the device.
        send_ahead: is told, before the last walk through the blocks of an expert that is about to be left,
            which networks the next step needs.
        interleaves: run each block for both sides of the guidance before the next block: weights come in once
            for both, at the price of one more stream of tokens; otherwise one side after the other.
    """

    def __init__(
        self,
        high: Expert,
        low: Expert | None = None,
        boundary: float = 0.875,
        step_cache: StepCache | None = None,
        *,
        bring_in: Callable[..., None] | None = None,
        send_ahead: Callable[..., None] | None = None,
        interleaves: bool = True,
    ) -> None:
        if not 0.0 <= boundary <= 1.0:
            raise ArgumentError(
                f"boundary is {boundary}; give 0 to 1 (0.875 for T2V-A14B, 0.9 for I2V-A14B)."
            )
        self.high, self.low, self.boundary, self.step_cache = high, low, boundary, step_cache
        self._bring_in, self._send_ahead, self._interleaves = bring_in, send_ahead, interleaves
        self._prepared: dict[ExpertName, _Prepared] = {}
        self._extent = (0, 0)  # steps and sides of the generation

    def name_at(self, timestep: Tensor) -> ExpertName:
        """Who answers: the step's own time is the largest of the clocks."""
        return "high" if self.low is None or float(timestep.max()) >= self.boundary * 1000 else "low"

    def networks_of(self, step: Step) -> tuple[str, ...]:
        """Names of the networks that a step needs."""
        return self._expert(step.expert).networks

    def begin(self, count: int, sides: int) -> None:
        """A generation of so many steps, with so many sides of the guidance, begins."""
        self._extent = (count, sides)
        self.forget()

    def forget(self) -> None:
        """Prepare anew at the next step: the weights that prepared branches came from have changed."""
        self._prepared.clear()
        if self.step_cache is not None:
            self.step_cache.begin(*self._extent)

    def __call__(self, latents: Tensor, step: Step, sides: Sequence[Side]) -> list[Tensor]:
        """One velocity (B, C, F, H, W) float32 per side of the guidance."""
        cache = self.step_cache
        answers = [None if cache is None else cache.answer(step, side.index, latents) for side in sides]
        velocities = self._asked(latents, step, [s for s, a in zip(sides, answers, strict=True) if a is None])
        return [velocities[s.index] if a is None else a for s, a in zip(sides, answers, strict=True)]

    def _asked(self, latents: Tensor, step: Step, sides: Sequence[Side]) -> dict[int, Tensor]:
        expert, cache = self._expert(step.expert), self.step_cache
        self._forget_others(step.expert)
        if not sides:
            self._announce(step)
            return {}
        if self._bring_in is not None:
            self._bring_in(*expert.networks)
        branches = [self._branch(expert, step.expert, side) for side in sides]
        together = [branches] if self._interleaves else [[branch] for branch in branches]
        velocities: dict[int, Tensor] = {}
        for walk, some in enumerate(together, start=1):
            if walk == len(together):
                self._announce(step)
            call = expert.dit if expert.call is None else expert.call
            made = call(latents, step.timestep, some, cache, step)
            velocities |= {branch.side: one for branch, one in zip(some, made, strict=True)}
        if cache is not None:
            for side, velocity in velocities.items():
                cache.keep(step, side, velocity=velocity)
        return velocities

    def _announce(self, step: Step) -> None:
        """Say which networks the next step needs, if they are others."""
        if step.next is None or step.next.expert == step.expert or self._send_ahead is None:
            return
        self._send_ahead(*self.networks_of(step.next))

    def _expert(self, name: ExpertName) -> Expert:
        return self.high if name == "high" or self.low is None else self.low

    def _branch(self, expert: Expert, name: ExpertName, side: Side) -> Branch:
        prepared = self._prepared.setdefault(name, _Prepared())
        kept = prepared.branches.get(side.index)
        if kept is None or kept[0].conditions is not side.conditions or kept[0].skips != side.skips:
            branch = expert.dit.prepare(
                side.conditions, expert.adapters, side=side.index, skips=side.skips,
                memories=prepared.memories,
            )  # fmt: skip
            kept = prepared.branches[side.index] = (side, branch)
        return kept[1]

    def _forget_others(self, name: ExpertName) -> None:
        # Timesteps fall: an expert that was left does not come back, and its keys are hundreds of megabytes.
        self._prepared = {kept: prepared for kept, prepared in self._prepared.items() if kept == name}

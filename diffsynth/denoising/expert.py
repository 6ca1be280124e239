"""Who answers at a noise level: one DiT, or two that share the range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.errors import ArgumentError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.dit import Branch, StepCache, WanDiT


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A DiT with its adapters."""

    dit: WanDiT
    adapters: tuple[DiTAdapter, ...] = ()
    networks: tuple[str, ...] = ("dit",)  # the names under which these come to the device
    call: Callable[..., list[Tensor]] | None = None  # in place of the DiT's: what torch.compile made of it


class Experts:
    """One or two experts, for one generation; keeps one branch per expert and side of the guidance.

    Args:
        high: answers at high noise, or everywhere when there is no ``low``.
        low: answers where the timestep is below the boundary.
        boundary: share of 1000; 0.875 for Wan2.2 T2V, 0.900 for I2V.
        step_cache: may answer instead of the blocks.
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
        self._next: Expert | None = None
        self._branches: dict[tuple[bool, int], tuple[Conditions, Branch]] = {}

    def is_high(self, timestep: Tensor) -> bool:
        """Whether the high-noise expert answers: the step's own time is the largest of the clocks."""
        return self.low is None or float(timestep.max()) >= self.boundary * 1000

    def networks_at(self, timestep: Tensor) -> tuple[str, ...]:
        """Names of the networks that a step at this time needs."""
        return self._expert(self.is_high(timestep)).networks

    def foresee(self, timestep: Tensor | None) -> None:
        """Say at which time the step after the coming one is asked for; None: there is none."""
        self._next = None if timestep is None else self._expert(self.is_high(timestep))

    def __call__(self, latents: Tensor, timestep: Tensor, sides: Sequence[Conditions]) -> list[Tensor]:
        """One velocity (B, C, F, H, W) float32 per side of the guidance."""
        is_high = self.is_high(timestep)
        expert = self._expert(is_high)
        self._forget(not is_high)
        if self._bring_in is not None:
            self._bring_in(*expert.networks)
        branches = [self._branch(expert, is_high, side, index) for index, side in enumerate(sides)]
        together = [branches] if self._interleaves else [[branch] for branch in branches]
        velocities: list[Tensor] = []
        for walk, some in enumerate(together, start=1):
            is_last = walk == len(together) and self._next is not None and self._next is not expert
            if is_last and self._next is not None and self._send_ahead is not None:
                self._send_ahead(*self._next.networks)
            call = expert.dit if expert.call is None else expert.call
            velocities += call(latents, timestep, some, self.step_cache)
        return velocities

    def forget(self) -> None:
        """Prepare anew at the next step: the weights that prepared branches came from have changed."""
        self._branches.clear()

    def _expert(self, is_high: bool) -> Expert:
        return self.high if is_high or self.low is None else self.low

    def _branch(self, expert: Expert, is_high: bool, side: Conditions, index: int) -> Branch:
        slot = (is_high, index)
        kept = self._branches.get(slot)
        if kept is None or kept[0] is not side:
            key = f"{'high' if is_high else 'low'} {'positive' if index == 0 else 'negative'}"
            kept = self._branches[slot] = (side, expert.dit.prepare(side, expert.adapters, key))
        return kept[1]

    def _forget(self, is_high: bool) -> None:
        # Timesteps fall: an expert that was left does not come back, and its keys are hundreds of megabytes.
        for slot in [slot for slot in self._branches if slot[0] == is_high]:
            del self._branches[slot]

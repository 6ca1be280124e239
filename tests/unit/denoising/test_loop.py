"""The loop walks, holds what is pinned, and stops when it is told or must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.conditions import LatentPlan
from diffsynth.denoising.expert import Experts
from diffsynth.denoising.guidance import Guidance, classifier_free
from diffsynth.denoising.loop import denoise, steps_of
from diffsynth.errors import NotFiniteError
from diffsynth.sampling.registry import SAMPLERS
from diffsynth.sampling.sampler import Sampler
from tests.unit.denoising.asking import ask, at
from tests.unit.denoising.test_experts import LATENTS, expert, side

GUIDANCE = Guidance(high=3.0, low=3.0)


def sampler(num_steps: int = 4, name: str = "euler") -> Sampler:
    made = SAMPLERS[name]()
    made.reset(num_steps, 3.0)
    return made


@torch.no_grad()
def walk(experts: Experts, latents: Tensor = LATENTS, **changed: Any) -> Tensor:
    usual: dict[str, Any] = {
        "plan": LatentPlan(), "on_step": lambda step, told, latents: latents, "progress": iter,
    }  # fmt: skip
    grid, guidance = changed.pop("sampler", sampler()), changed.pop("guidance", GUIDANCE)
    arguments = {**usual, **changed}
    dtype = arguments.pop("timestep_dtype", None)
    num_pinned = arguments["plan"].num_pinned
    steps = steps_of(grid, experts, latents.shape, num_pinned=num_pinned, timestep_dtype=dtype)
    branches = classifier_free(side(1), side(2), guidance)
    return denoise(experts, grid, latents, steps=steps, branches=branches, **arguments)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_walk_is_the_sampler_over_the_answers(name: str) -> None:
    one, by_hand = expert(), LATENTS
    hand, positive, negative = sampler(name=name), side(1), side(2)
    with torch.no_grad():
        for index, told in enumerate(hand.timesteps):
            toward, away = ask(Experts(one), by_hand, told.double().expand(1), [positive, negative])
            by_hand = hand.step(away + 3.0 * (toward - away), index, by_hand)
    # guidance by lerp rounds once where the sum rounds twice, over four steps
    torch.testing.assert_close(walk(Experts(one), sampler=sampler(name=name)), by_hand, atol=2e-5, rtol=1e-5)


def test_pinned_frames_stay_and_stand_at_time_0() -> None:
    one, clean = expert(), torch.full((1, 16, 1, 4, 4), 0.25)
    told: list[Tensor] = []
    one.dit.register_forward_pre_hook(lambda _, arguments: told.append(arguments[1]))
    plan = LatentPlan(pinned=clean)
    made = walk(Experts(one), plan.pin(LATENTS), plan=plan)
    assert torch.equal(made[:, :, :1], clean) and not torch.equal(made[:, :, 1:], LATENTS[:, :, 1:])
    assert all(t.shape == (1, 2) and t[0, 0] == 0 and t[0, 1] > 0 for t in told)


def test_the_loop_does_not_write_over_its_input() -> None:
    before = LATENTS.clone()
    walk(Experts(expert()))
    assert torch.equal(LATENTS, before)


def test_none_from_on_step_stops() -> None:
    seen: list[tuple[int, float]] = []

    def stop_after_two(step: int, told: Tensor, latents: Tensor) -> Tensor | None:
        seen.append((step, float(told)))
        return None if step == 1 else latents

    steps = sampler()
    walk(Experts(expert()), on_step=stop_after_two, sampler=steps)
    assert seen == [(0, float(steps.timesteps[0])), (1, float(steps.timesteps[1]))]


def test_latents_of_on_step_are_taken() -> None:
    made = walk(Experts(expert()), on_step=lambda step, told, latents: latents * 0)
    assert not made.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_stops_at_the_first_step(value: float) -> None:
    one = expert()
    one.dit.blocks[1].ffn[0].weight[0, 0] = value
    with pytest.raises(NotFiniteError, match="not finite after step 1 of 4"):
        walk(Experts(one))


def test_told_times_can_be_rounded_as_v1_did() -> None:
    one = expert()
    told: list[Tensor] = []
    one.dit.register_forward_pre_hook(lambda _, arguments: told.append(arguments[1]))
    walk(Experts(one), timestep_dtype=torch.bfloat16)
    assert all(torch.equal(t, t.bfloat16().double()) for t in told)
    assert [float(t) for t in told] != sampler().timesteps.tolist()


def test_each_expert_has_its_scale() -> None:
    experts = Experts(expert(1), expert(2), 0.8)
    both = walk(experts, guidance=Guidance(high=3.0, low=1.0))
    assert not torch.equal(both, walk(experts, guidance=Guidance(high=3.0, low=3.0)))
    assert [experts.name_at(at(time)) for time in (1000.0, 500.0)] == ["high", "low"]


def test_a_step_knows_its_place_and_the_one_behind_it() -> None:
    grid = sampler()
    steps = steps_of(grid, Experts(expert(1), expert(2), 0.8), LATENTS.shape)
    assert [(step.index, step.count) for step in steps] == [(index, 4) for index in range(4)]
    assert [step.sigma for step in steps] == grid.sigmas[:4].tolist()
    assert [step.next for step in steps] == [*steps[1:], None]
    assert [step.expert for step in steps] == ["high", "high", "low", "low"]
    assert "next" not in repr(steps[0])

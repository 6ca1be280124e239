"""Which expert answers when, and what is kept between the calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Expert, Experts, Side
from diffsynth.denoising.guidance import Guidance, Guided, classifier_free, guided
from diffsynth.errors import ArgumentError
from diffsynth.models.wan.dit import WanDiT
from diffsynth.sampling.registry import SAMPLERS
from diffsynth.sampling.step import Step
from tests.golden_recipe import recipe_state_dict
from tests.step_caches import NoCache
from tests.toys import TOY_DIT
from tests.unit.denoising.asking import ask, at, step_at


def expert(seed: int = 0) -> Expert:
    dit = WanDiT(TOY_DIT)
    dit.load_state_dict(
        recipe_state_dict({name: tuple(t.shape) for name, t in dit.state_dict().items()}, seed)
    )
    return Expert(dit=dit.eval().requires_grad_(False))


def side(seed: int) -> Conditions:
    return Conditions(text=torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed)))


LATENTS = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("sampler", "num_steps", "shift", "boundary", "expected"),
    [
        pytest.param("unipc", 40, 12.0, 0.875, (26, 14), id="T2V-A14B"),
        pytest.param("dpm++", 40, 12.0, 0.875, (26, 14), id="T2V-A14B-dpm++"),
        pytest.param("unipc", 40, 5.0, 0.900, (15, 25), id="I2V-A14B"),
    ],
)
def test_official_grids_are_shared_as_officially(
    sampler: str, num_steps: int, shift: float, boundary: float, expected: tuple[int, int]
) -> None:
    experts = Experts(expert(), expert(1), boundary)
    grid = SAMPLERS[sampler]()
    grid.reset(num_steps, shift)
    answers = [experts.name_at(told) == "high" for told in grid.timesteps]
    assert answers == sorted(answers, reverse=True), "one change, from high to low"
    assert (sum(answers), num_steps - sum(answers)) == expected


@torch.no_grad()
def test_the_expert_at_the_boundary_is_the_high_one() -> None:
    high, low = expert(1), expert(2)
    experts, positive = Experts(high, low, 0.875), side(1)
    for timestep, owner in ((875.0, high), (874.999, low)):
        [answer] = ask(experts, LATENTS, at(timestep), [positive])
        [alone] = owner.dit(LATENTS, at(timestep), [owner.dit.prepare(positive)])
        assert torch.equal(answer, alone)


@torch.no_grad()
def test_clean_frames_do_not_decide_who_answers() -> None:
    experts = Experts(expert(1), expert(2), 0.875)
    assert experts.name_at(torch.tensor([[0.0, 900.0]])) == "high", "the step's own time is the largest"
    assert experts.name_at(torch.tensor([[0.0, 800.0]])) == "low"
    assert Experts(expert()).name_at(at(1.0)) == "high", "an expert alone answers everywhere"


@torch.no_grad()
def test_a_branch_is_prepared_once_and_forgotten_with_its_expert() -> None:
    high, low = expert(1), expert(2)
    prepared: list[str] = []
    for name, one in (("high", high), ("low", low)):
        one.dit.text_embedding.register_forward_hook(lambda *_, name=name: prepared.append(name))
    experts, sides = Experts(high, low, 0.5), [side(1), side(2)]
    for timestep in (900.0, 800.0, 400.0, 300.0):
        ask(experts, LATENTS, at(timestep), sides)
    assert prepared == ["high", "high", "low", "low"]
    ask(experts, LATENTS, at(900.0), sides)
    assert prepared[4:] == ["high", "high"], "keys of an expert that was left are not kept"
    ask(experts, LATENTS, at(900.0), [side(3), sides[1]])
    assert prepared[6:] == ["high"], "a new side is prepared, the other kept"


@torch.no_grad()
def test_both_sides_in_one_call_equal_two_calls() -> None:
    one = expert()
    positive, negative = side(1), side(2)
    both = ask(Experts(one), LATENTS, at(500.0), [positive, negative])
    alone = [ask(Experts(one), LATENTS, at(500.0), [s])[0] for s in (positive, negative)]
    experts = Experts(one)
    step = step_at(experts, at(500.0))

    def mix(scale: float) -> torch.Tensor:
        branches = classifier_free(positive, negative, Guidance(high=scale, low=0.0))
        return guided(experts, LATENTS, step, branches)

    assert torch.equal(both[0], alone[0]) and torch.equal(both[1], alone[1])
    mixed = mix(3.0)
    # lerp rounds once where the sum rounds twice
    torch.testing.assert_close(mixed, alone[1] + 3.0 * (alone[0] - alone[1]), atol=1e-5, rtol=1e-6)
    assert torch.equal(mix(1.0), alone[0])
    assert torch.equal(mix(0.0), alone[1])


@torch.no_grad()
def test_three_sides_are_a_weighted_sum_and_one_of_no_weight_is_not_asked() -> None:
    one = expert()
    experts, step = Experts(one), step_at(Experts(one), at(500.0))
    asked: list[int] = []
    one.dit.register_forward_pre_hook(lambda _, arguments: asked.append(len(arguments[2])))

    def weighing(*weights: float) -> torch.Tensor:
        sides = zip((side(1), side(2), side(3)), weights, strict=True)
        branches = [Guided(conditions=c, weight=lambda step, w=w: w) for c, w in sides]
        return guided(experts, LATENTS, step, branches)

    first, second, third = (weighing(*(float(i == j) for j in range(3))) for i in range(3))
    torch.testing.assert_close(weighing(3.0, -4.0, 2.0), 3 * first - 4 * second + 2 * third)
    torch.testing.assert_close(weighing(0.0, 2.0, 2.0), 2 * second + 2 * third)
    assert asked == [1, 1, 1, 3, 2]
    with pytest.raises(ArgumentError, match="All sides of the guidance weigh 0 at step 1"):
        weighing(0.0, 0.0, 0.0)


@torch.no_grad()
def test_an_answered_step_still_sends_the_next_expert_ahead() -> None:
    class Answers(NoCache):
        def answer(self, step: Step, side: int, latents: torch.Tensor) -> torch.Tensor | None:
            return torch.zeros_like(latents)

    high, low = replace(expert(1), networks=("high",)), replace(expert(2), networks=("low",))
    entered: list[str] = []
    sent: list[str] = []
    experts = Experts(high, low, 0.8, Answers(), bring_in=entered.append, send_ahead=sent.append)
    following = step_at(experts, at(500.0))
    told = [Side(index=0, conditions=side(1))]
    assert not experts(LATENTS, step_at(experts, at(900.0), following), told)[0].any()
    assert (entered, sent) == ([], ["low"])
    experts(LATENTS, step_at(experts, at(500.0), step_at(experts, at(400.0))), told)
    assert sent == ["low"], "the next step is of the same expert"


@torch.no_grad()
def test_a_side_may_leave_blocks_out() -> None:
    one = expert()
    experts, step, told = Experts(one), step_at(Experts(one), at(500.0)), side(1)

    def skipping(*blocks: int) -> torch.Tensor:
        branch = Guided(conditions=told, weight=lambda step: 1.0, skips=frozenset(blocks))
        return guided(experts, LATENTS, step, [branch])

    whole = skipping()
    assert not torch.equal(skipping(1), whole) and torch.equal(skipping(), whole)
    one.dit.blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("block 1 ran"))
    skipping(1)
    with pytest.raises(ArgumentError, match="block 9 is to be left out; this DiT has the blocks 0 to 1"):
        skipping(9)


@pytest.mark.parametrize("boundary", [-0.1, 875.0])
def test_a_boundary_outside_of_0_to_1_is_told(boundary: float) -> None:
    with pytest.raises(ArgumentError, match="give 0 to 1"):
        Experts(expert(), expert(1), boundary)

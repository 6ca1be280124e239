"""Noise levels, weights and losses: functions of (seed, step, sample), of the shape that was asked for."""

from __future__ import annotations

import pytest
import torch

from diffsynth.errors import ArgumentError
from diffsynth.sampling.schedule import shifted_sigmas
from diffsynth.training.objective import LEVELS, FlowMatchObjective, Levels, ObjectiveConfig

SHAPE = (4, 3, 2, 2)


def levels_drawn(objective: FlowMatchObjective, count: int = 2000, **limits: float) -> torch.Tensor:
    middles = [(i + 0.5) / count for i in range(count)]
    return torch.tensor([objective.sigma_at(q, **limits) for q in middles], dtype=torch.float64)


def test_noise_and_sigma_depend_on_seed_step_and_sample_alone() -> None:
    objective = FlowMatchObjective()
    sigma, noise = objective.draw(1, 7, ["a", "b"], SHAPE)
    torch.manual_seed(123)
    again, same = objective.draw(1, 7, ["b"], SHAPE)
    assert sigma.dtype == torch.float64 and noise.dtype == torch.float32
    assert again[0] == sigma[1] and torch.equal(same[0], noise[1])
    for other in ((2, 7, "b"), (1, 8, "b"), (1, 7, "c")):
        assert not torch.equal(objective.draw(other[0], other[1], [other[2]], SHAPE)[1], same)


def test_drawn_noise_is_standard_and_not_tied_to_sigma() -> None:
    objective = FlowMatchObjective(ObjectiveConfig(levels="uniform"))
    sigma, noise = objective.draw(0, 0, [str(i) for i in range(400)], (8, 2, 2, 2))
    # deviations of the mean of 400 and of 25,600 draws, times 4
    assert abs(float(sigma.mean()) - 0.5) < 4 * 0.29 / 20
    assert abs(float(noise.mean())) < 0.025 and abs(float(noise.std()) - 1) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([sigma, noise.double().mean((1, 2, 3, 4))]))[0, 1])) < 0.2


def test_default_draws_each_of_the_shifted_levels_equally_often() -> None:
    drawn = levels_drawn(FlowMatchObjective())
    grid = shifted_sigmas(1000, shift=5.0)
    torch.testing.assert_close(drawn, grid.repeat_interleave(2), rtol=0, atol=0)
    assert float((drawn >= 0.875).double().mean()) == 0.417  # v1's share of high noise; facts, 2.3


@pytest.mark.parametrize(
    ("levels", "median"),
    [("v1", 0.8333), ("uniform", 0.5), ("shift", 0.8333), ("logit_normal", 0.5), ("mode", 0.5)],
)
def test_levels_fall_and_have_their_median(levels: Levels, median: float) -> None:
    drawn = levels_drawn(FlowMatchObjective(ObjectiveConfig(levels=levels)))
    assert (drawn.diff() <= 0).all() and drawn.min() > 0 and drawn.max() <= 1
    assert float(drawn.median()) == pytest.approx(median, abs=2e-3)  # the grid's own step


def test_logit_normal_is_one() -> None:
    drawn = levels_drawn(
        FlowMatchObjective(ObjectiveConfig(levels="logit_normal", logit_mean=0.5, logit_std=0.8))
    )
    logits = torch.log(drawn / (1 - drawn))
    assert float(logits.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(logits.std()) == pytest.approx(0.8, abs=5e-3)  # 2000 quantiles lack the tails


def test_mode_is_the_papers_formula() -> None:
    objective = FlowMatchObjective(ObjectiveConfig(levels="mode", mode_scale=1.29))
    for u in (0.1, 0.35, 0.8):
        paper = 1 - u - 1.29 * (torch.cos(torch.tensor(torch.pi * u / 2, dtype=torch.float64)) ** 2 - 1 + u)
        assert objective.sigma_at(u) == pytest.approx(float(paper), abs=1e-12)


@pytest.mark.parametrize("levels", LEVELS)
def test_limits_cut_levels_off_and_leave_the_others_as_likely(levels: Levels) -> None:
    objective = FlowMatchObjective(ObjectiveConfig(levels=levels, max_timestep=900.0))
    drawn = levels_drawn(objective, low=300.0, high=1000.0)
    assert drawn.min() + 1e-9 >= 0.3 and drawn.max() <= 0.9 + 1e-9
    whole = levels_drawn(FlowMatchObjective(ObjectiveConfig(levels=levels)), 20_000)
    inside = whole[(whole >= 0.3) & (whole <= 0.9)]
    assert float(drawn.median()) == pytest.approx(float(inside.median()), abs=3e-3)


@pytest.mark.parametrize("levels", LEVELS)
def test_bell_is_one_on_average_and_nothing_at_the_noisy_end(levels: Levels) -> None:
    objective = FlowMatchObjective(ObjectiveConfig(levels=levels))
    assert float(objective.weight(levels_drawn(objective)).mean()) == pytest.approx(1.0, abs=2e-3)
    assert objective.weight(torch.tensor([1.0])) == 0.0
    plain = FlowMatchObjective(ObjectiveConfig(levels=levels, weighting="none"))
    assert (plain.weight(levels_drawn(plain)) == 1).all()


def test_loss_is_the_mean_of_the_samples_and_leaves_pinned_frames_out() -> None:
    objective = FlowMatchObjective()
    sigma, noise = objective.draw(0, 0, ["a", "b"], SHAPE)
    latents, velocity = torch.randn(2, 2, *SHAPE)
    wrong = velocity.clone()
    wrong[:, :, 0] += 100
    losses = objective.losses(velocity, latents, noise, sigma, num_pinned=1)
    assert torch.equal(objective.losses(wrong, latents, noise, sigma, num_pinned=1), losses)
    assert not torch.equal(objective.losses(wrong, latents, noise, sigma), losses)
    by_hand = (velocity - (noise - latents))[:, :, 1:].square().mean((1, 2, 3, 4)) * objective.weight(sigma)
    torch.testing.assert_close(losses, by_hand)
    assert torch.equal(objective.loss(velocity, latents, noise, sigma, 1), losses.mean())


def test_pinned_frames_are_told_as_clean() -> None:
    told = FlowMatchObjective().timesteps(torch.tensor([0.5, 1.0]), 3, num_pinned=1)
    assert told.tolist() == [[0.0, 500.0, 500.0], [0.0, 1000.0, 1000.0]]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"levels": "cosine"}, "known: v1, uniform"),
        ({"weighting": "snr"}, "known: bell, none"),
        ({"shift": 0.0}, "above 0"),
        ({"mode_scale": 3.0}, "-1 to 1.75"),
        ({"min_timestep": 900.0, "max_timestep": 100.0}, "min_timestep < max_timestep"),
    ],
)
def test_wrong_configurations_say_what_to_give(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        ObjectiveConfig(**wrong)  # type: ignore[arg-type]


def test_limits_without_a_level_and_clips_of_pinned_frames_alone_are_errors() -> None:
    with pytest.raises(ArgumentError, match="No noise level is drawn between"):
        FlowMatchObjective(ObjectiveConfig(min_timestep=1.0, max_timestep=2.0))
    with pytest.raises(ArgumentError, match="No noise level is drawn between"):
        FlowMatchObjective(ObjectiveConfig(max_timestep=500.0)).draw(0, 0, ["a"], SHAPE, low=600.0)
    with pytest.raises(ArgumentError, match="nothing is left to learn"):
        FlowMatchObjective().losses(*torch.zeros(3, 1, *SHAPE), torch.ones(1), num_pinned=3)

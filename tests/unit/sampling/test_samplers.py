"""Steps of the samplers: exactness, order, memory, types, and equality with diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth.errors import ArgumentError
from diffsynth.sampling.registry import SAMPLERS, sampler_for
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.schedule import add_noise

EVERY_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)
MULTISTEP = pytest.mark.parametrize("name", ["unipc", "dpm++"])


def reset(name: str, num_steps: int, shift: float, strength: float = 1.0) -> Sampler:
    sampler = SAMPLERS[name]()
    sampler.reset(num_steps, shift, strength)
    return sampler


def curved(latents: Tensor, sigma: Tensor) -> Tensor:
    return 0.3 * torch.sin(latents) + sigma


def solve(
    sampler: Sampler, latents: Tensor, velocity: Callable[[Tensor, Tensor], Tensor] = curved
) -> list[Tensor]:
    trajectory = []
    for index in range(len(sampler.timesteps)):
        latents = sampler.step(velocity(latents, sampler.sigmas[index]), index, latents)
        trajectory.append(latents)
    return trajectory


@pytest.fixture
def start() -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@EVERY_SAMPLER
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(("num_steps", "shift"), [(1, 5.0), (2, 5.0), (3, 1.0), (50, 5.0), (100, 16.0)])
def test_straight_line_is_solved_exactly(name: str, num_steps: int, shift: float, strength: float) -> None:
    generator = torch.Generator().manual_seed(1)
    video, noise = torch.randn(2, 40, generator=generator), torch.randn(2, 40, generator=generator)
    sampler = reset(name, num_steps, shift, strength)
    trajectory = solve(sampler, add_noise(video, noise, sampler.sigmas[0]), lambda x, s: noise - video)
    for sigma, latents in zip(sampler.sigmas[1:], trajectory, strict=True):
        # float32: values to 6, rounded at each of up to 100 steps
        torch.testing.assert_close(latents, add_noise(video, noise, sigma), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_error_falls_with_the_order_of_the_sampler(name: str, order: int) -> None:
    # dx/dsigma = x + sigma has the solution x = (x_1 + sigma_1 + 1) exp(sigma - sigma_1) - sigma - 1
    def error(num_steps: int) -> float:
        sampler = reset(name, num_steps, 1.0)
        first = float(sampler.sigmas[0])
        latents = solve(sampler, torch.ones(1, dtype=torch.float64), lambda x, sigma: x + sigma)[-1]
        return abs(float(latents) - ((1.0 + first + 1.0) * math.exp(-first) - 1.0))

    measured = math.log2(error(320) / error(640))
    assert measured == pytest.approx(order, abs=0.25)  # twice the steps divide the error by 2 ** order


@EVERY_SAMPLER
def test_run_leaves_no_trace_in_the_next(name: str, start: Tensor) -> None:
    expected = solve(reset(name, 6, 5.0), start)
    used = reset(name, 9, 3.0)
    solve(used, -start)
    used.reset(6, 5.0)
    again = solve(used, start)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@EVERY_SAMPLER
def test_step_zero_starts_again_after_an_interrupted_run(name: str, start: Tensor) -> None:
    sampler = reset(name, 6, 5.0)
    expected = solve(sampler, start)
    latents = start + 1
    for index in range(3):
        latents = sampler.step(curved(latents, sampler.sigmas[index]), index, latents)
    assert all(torch.equal(one, other) for one, other in zip(solve(sampler, start), expected, strict=True))


@MULTISTEP
def test_memory_is_given_back_after_the_last_step(name: str, start: Tensor) -> None:
    sampler = reset(name, 3, 5.0)
    solve(sampler, start)
    assert not [value for value in vars(sampler).values() if isinstance(value, Tensor) and value.ndim > 1]


@MULTISTEP
@pytest.mark.parametrize("index", [1, 2, 4])
def test_step_out_of_order_is_an_error(name: str, index: int, start: Tensor) -> None:
    sampler = reset(name, 6, 5.0)
    for done in range(3):
        sampler.step(start, done, start)
    with pytest.raises(ArgumentError, match=f"Step {index} was asked for after 3 steps.*3 is next"):
        sampler.step(start, index, start)


@MULTISTEP
def test_run_cannot_start_in_the_middle(name: str, start: Tensor) -> None:
    with pytest.raises(ArgumentError, match="0 starts again"):
        reset(name, 6, 5.0).step(start, 1, start)


def test_euler_steps_need_no_order(start: Tensor) -> None:
    sampler = reset("euler", 6, 5.0)
    change = float(sampler.sigmas[5] - sampler.sigmas[4])
    torch.testing.assert_close(sampler.step(start, 4, start), start + change * start)


@EVERY_SAMPLER
@pytest.mark.parametrize("index", [-1, 4])
def test_step_outside_the_run_is_an_error(name: str, index: int, start: Tensor) -> None:
    with pytest.raises(ArgumentError, match=f"Step {index} .* steps 0 to 3"):
        reset(name, 4, 5.0).step(start, index, start)


@EVERY_SAMPLER
def test_sampler_without_a_grid_says_what_to_call(name: str, start: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"call reset\(\) or set_sigmas\(\) first"):
        SAMPLERS[name]().step(start, 0, start)


@EVERY_SAMPLER
def test_velocity_of_another_shape_is_an_error(name: str, start: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"\(1, 3, 4, 5\) and the latents \(2, 3, 4, 5\)"):
        reset(name, 4, 5.0).step(start[:1], 0, start)


@EVERY_SAMPLER
def test_latents_are_not_changed_and_may_be_by_the_caller(name: str, start: Tensor) -> None:
    expected = solve(reset(name, 6, 5.0), start)
    sampler = reset(name, 6, 5.0)
    latents = start.clone()
    for index, wanted in enumerate(expected):
        before = latents.clone()
        following = sampler.step(curved(latents, sampler.sigmas[index]), index, latents)
        assert torch.equal(latents, before)
        latents.zero_()  # a caller may reuse its memory: what the solver remembers is its own
        latents = following.clone()
        following.zero_()
        assert torch.equal(latents, wanted)


@EVERY_SAMPLER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_step_keeps_the_type_of_the_latents(name: str, dtype: torch.dtype, start: Tensor) -> None:
    for velocity_dtype in (torch.bfloat16, torch.float32):
        sampler = reset(name, 3, 5.0)
        latents = start.to(dtype)
        for index in range(3):
            latents = sampler.step(start.to(velocity_dtype), index, latents)
            assert latents.dtype == dtype


@EVERY_SAMPLER
def test_bf16_velocity_is_not_a_bf16_step(name: str, start: Tensor) -> None:
    rounded = start.bfloat16()
    narrow, wide = reset(name, 4, 5.0), reset(name, 4, 5.0)
    for index in range(4):
        assert torch.equal(narrow.step(rounded, index, start), wide.step(rounded.float(), index, start))


class CountKernels(TorchDispatchMode):
    """Counts the operations that would each be one launch on a GPU."""

    num_kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_kernels += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("euler", 2), ("dpm++", 4), ("unipc", 8)])
def test_step_launches_few_kernels(name: str, most: int, start: Tensor) -> None:
    sampler = reset(name, 6, 5.0)
    for index in range(6):
        with CountKernels() as counter:
            sampler.step(start, index, start)
        assert counter.num_kernels <= most


OWN_GRIDS = [
    pytest.param([1.0, 0.9375, 0.8333, 0.625], id="starts-at-one"),
    pytest.param([0.9999995, 0.9, 0.5], id="starts-within-a-millionth-of-one"),
    pytest.param([1.0], id="one-step"),
    pytest.param([1.0, 0.5], id="two-steps"),
    pytest.param([0.95, 0.9, 0.4, 0.3, 0.05], id="uneven"),
]
GRIDS = [pytest.param((1, 5.0), id="1-step"), pytest.param((2, 5.0), id="2-steps")] + [
    pytest.param(grid, id=f"{grid[0]}-steps-shift-{grid[1]:g}")
    for grid in [(3, 1.0), (10, 3.0), (50, 5.0), (40, 12.0), (100, 16.0)]
]


def solve_with_diffusers(scheduler: Any, latents: Tensor) -> list[Tensor]:
    scheduler.set_begin_index(0)  # else repeated timesteps are looked up, and the second is taken
    trajectory = []
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = curved(latents, scheduler.sigmas[index])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        trajectory.append(latents)
    return trajectory


def diffusers_unipc(sigmas: Tensor) -> Any:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1
    )
    scheduler.set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float64))
    return scheduler


@pytest.mark.parametrize("grid", GRIDS)
def test_unipc_step_equals_diffusers_on_our_grid(grid: tuple[int, float], start: Tensor) -> None:
    sampler = reset("unipc", *grid)
    expected = torch.stack(solve_with_diffusers(diffusers_unipc(sampler.sigmas[:-1]), start))
    # diffusers computes lambda in float32, where 1 - sigma holds 4 digits near the top of large shifts
    torch.testing.assert_close(torch.stack(solve(sampler, start)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sigmas", OWN_GRIDS)
def test_unipc_step_equals_diffusers_on_a_users_grid(sigmas: list[float], start: Tensor) -> None:
    sampler = SAMPLERS["unipc"]()
    sampler.set_sigmas(sigmas)
    expected = torch.stack(solve_with_diffusers(diffusers_unipc(torch.tensor(sigmas).double()), start))
    # float32 as above; and diffusers tells the velocity the lowered first level, ours tells it 1
    torch.testing.assert_close(torch.stack(solve(sampler, start)), expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' own start
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
def test_dpmpp_step_equals_diffusers(num_steps: int, start: Tensor) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    sampler = SAMPLERS["dpm++"]()
    sampler.set_sigmas(scheduler.sigmas[:-1])  # its grid starts below 1, ours is the official one
    expected = torch.stack(solve_with_diffusers(scheduler, start))
    torch.testing.assert_close(torch.stack(solve(sampler, start)), expected, rtol=0, atol=2e-5)


@EVERY_SAMPLER
@pytest.mark.parametrize("sigmas", OWN_GRIDS)
def test_grid_that_starts_at_pure_noise_gives_finite_latents(
    name: str, sigmas: list[float], start: Tensor
) -> None:
    sampler = SAMPLERS[name]()
    sampler.set_sigmas(sigmas)
    assert all(latents.isfinite().all() for latents in solve(sampler, start))


def test_repeated_timesteps_do_not_confuse_the_steps(start: Tensor) -> None:
    sampler = reset("unipc", 100, 16.0)
    assert sampler.timesteps[0] == sampler.timesteps[1]  # where a search by timestep runs past the end
    trajectory = solve(sampler, start)
    assert len(trajectory) == 100 and trajectory[-1].isfinite().all()


@EVERY_SAMPLER
def test_sampler_is_made_by_steps_or_by_a_grid_of_ones_own(name: str) -> None:
    by_steps = sampler_for(name, num_steps=4, shift=5.0, strength=0.7)
    assert by_steps.sigmas.equal(reset(name, 4, 5.0, 0.7).sigmas)
    own = sampler_for(name, num_steps=50, shift=5.0, sigmas=[0.9, 0.5], timesteps=[900, 400])
    assert own.sigmas.tolist() == pytest.approx([0.9, 0.5, 0.0]) and own.timesteps.tolist() == [900, 400]


@EVERY_SAMPLER
@pytest.mark.parametrize("next_index", range(6))
def test_another_sampler_goes_on_with_the_same_bits(name: str, next_index: int, start: Tensor) -> None:
    expected, left, latents = solve(reset(name, 5, 5.0), start), reset(name, 5, 5.0), start
    for index in range(next_index):
        latents = left.step(curved(latents, left.sigmas[index]), index, latents)
    state = {key: tensor.clone() for key, tensor in left.state().items()}
    kept = {key: tensor.clone() for key, tensor in state.items()}
    going_on = reset(name, 5, 5.0)
    going_on.restore(next_index, state)
    for index in range(next_index, 5):
        latents = going_on.step(curved(latents, going_on.sigmas[index]), index, latents)
    assert torch.equal(latents, expected[-1])
    assert all(torch.equal(kept[key], tensor) for key, tensor in state.items()), (
        "what is given is not changed"
    )


@EVERY_SAMPLER
def test_a_state_of_another_step_or_sampler_is_refused(name: str, start: Tensor) -> None:
    sampler = reset(name, 5, 5.0)
    for next_index in (-1, 6):
        with pytest.raises(ArgumentError, match=f"Step {next_index} was asked for; this run has 5 steps"):
            sampler.restore(next_index, {})
    with pytest.raises(ArgumentError, match="it is of another sampler or step"):
        sampler.restore(2, {"other": start})
    if name != "euler":
        with pytest.raises(ArgumentError, match="holds nothing and step 1 looks back at"):
            sampler.restore(1, {})

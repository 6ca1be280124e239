"""Grids and trajectories of the samplers against the reference schedulers.

Every case solves v(x, t) = 0.3 sin(x) + t / 1000, with t what the network is told, at its own tolerance.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth.sampling.registry import SAMPLERS
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.schedule import add_noise
from tests.golden import Case, case, names

SOLVERS = {"G_unipc_": "unipc", "G_dpmpp_": "dpm++", "G_flowmatch_wan_": "euler"}
CASES = [
    pytest.param(case(name), solver, id=name) for prefix, solver in SOLVERS.items() for name in names(prefix)
]
EULER_CASES = [pytest.param(case(name), id=name) for name in names("G_flowmatch_wan_")]


def prepared(golden: Case, solver: str) -> Sampler:
    sampler = SAMPLERS[solver]()
    config = golden.config
    sampler.reset(config["steps"], config["shift"], config.get("denoising_strength", 1.0))
    return sampler


def solve(sampler: Sampler, latents: Tensor) -> Tensor:
    trajectory = []
    for index, timestep in enumerate(sampler.timesteps):
        velocity = 0.3 * torch.sin(latents) + timestep / 1000
        latents = sampler.step(velocity, index, latents)
        trajectory.append(latents)
    return torch.stack(trajectory)


@pytest.mark.parametrize(("golden", "solver"), CASES)
def test_grid_is_the_reference_grid(golden: Case, solver: str) -> None:
    sampler = prepared(golden, solver)
    num_stored = len(golden.outputs["sigmas"])  # v1 does not store the final 0
    golden.assert_close("sigmas", sampler.sigmas[:num_stored])
    golden.assert_close("timesteps", sampler.timesteps)
    assert sampler.sigmas[-1] == 0.0 and len(sampler.sigmas) == len(sampler.timesteps) + 1


@pytest.mark.parametrize(("golden", "solver"), CASES)
def test_trajectory_is_the_reference_trajectory(golden: Case, solver: str) -> None:
    golden.assert_close("trajectory", solve(prepared(golden, solver), golden.inputs["start"]))


@pytest.mark.parametrize(("golden", "solver"), CASES)
def test_batch_of_two_solves_each_as_if_alone(golden: Case, solver: str) -> None:
    start = golden.inputs["start"]
    both = solve(prepared(golden, solver), torch.stack([start, -start]))
    golden.assert_close("trajectory", both[:, 0])
    torch.testing.assert_close(both[:, 1], solve(prepared(golden, solver), -start), rtol=0, atol=1e-6)


@pytest.mark.parametrize("golden", EULER_CASES)
def test_noise_is_added_as_in_the_reference(golden: Case) -> None:
    sampler = prepared(golden, "euler")
    latent, noise = golden.inputs["latent"], golden.inputs["noise"]
    golden.assert_close("add_noise_first", add_noise(latent, noise, sampler.sigmas[0]))
    middle = sampler.sigmas[golden.config["steps"] // 2]
    golden.assert_close("add_noise_middle", add_noise(latent, noise, middle))


@pytest.mark.parametrize("name", ["I_diffsynth_t2v_euler", "I_diffsynth_v2v_strength0.7"])
def test_pipeline_timesteps_of_v1_are_met(name: str) -> None:
    golden = case(name)
    golden.assert_close("timesteps", prepared(golden, "euler").timesteps)

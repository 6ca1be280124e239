"""Noise levels: the official and v1 grids, a user's own, and the errors in a user's words."""

from __future__ import annotations

import math

import pytest
import torch

from diffsynth.errors import ArgumentError
from diffsynth.sampling.registry import SAMPLERS
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.schedule import add_noise

EVERY_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)


def reset(name: str, num_steps: int, shift: float, strength: float = 1.0) -> Sampler:
    sampler = SAMPLERS[name]()
    sampler.reset(num_steps, shift, strength)
    return sampler


@EVERY_SAMPLER
@pytest.mark.parametrize("strength", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("shift", [0.5, 1.0, 5.0, 16.0])
@pytest.mark.parametrize("num_steps", [1, 2, 50, 100])
def test_sigmas_fall_to_exactly_zero(name: str, num_steps: int, shift: float, strength: float) -> None:
    sampler = reset(name, num_steps, shift, strength)
    assert sampler.sigmas.shape == (num_steps + 1,) and sampler.sigmas.dtype == torch.float32
    assert sampler.sigmas[0] <= 1.0 and sampler.sigmas[-1] == 0.0
    assert (sampler.sigmas.diff() < 0).all()
    assert sampler.timesteps.shape == (num_steps,)
    assert (sampler.timesteps.diff() <= 0).all()


# first five and last three integer timesteps of the official UniPC
OFFICIAL = [
    pytest.param(50, 5.0, [999, 995, 991, 987, 982], [241, 172, 92], id="t2v-50-steps-shift-5"),
    pytest.param(50, 8.0, [999, 997, 994, 991, 989], [337, 249, 140], id="50-steps-shift-8"),
    pytest.param(40, 3.0, [999, 991, 982, 973, 963], [195, 136, 71], id="i2v-480p-40-steps-shift-3"),
    pytest.param(40, 5.0, [999, 994, 989, 983, 978], [288, 208, 113], id="i2v-40-steps-shift-5"),
    pytest.param(50, 16.0, [999, 998, 997, 995, 994], [504, 399, 245], id="flf2v-50-steps-shift-16"),
    pytest.param(20, 5.0, [999, 989, 978, 965, 952], [468, 356, 208], id="20-steps-shift-5"),
    pytest.param(40, 12.0, [999, 997, 995, 993, 990], [492, 386, 235], id="a14b-40-steps-shift-12"),
]


@pytest.mark.parametrize(("num_steps", "shift", "first", "last"), OFFICIAL)
def test_unipc_tells_the_official_timesteps(
    num_steps: int, shift: float, first: list[int], last: list[int]
) -> None:
    timesteps = reset("unipc", num_steps, shift).timesteps
    assert timesteps.dtype == torch.int64
    assert timesteps[:5].tolist() == first and timesteps[-3:].tolist() == last


def test_unipc_sigmas_are_the_official_ones() -> None:
    sigmas = reset("unipc", 50, 5.0).sigmas
    expected = torch.tensor([0.9997998, 0.9957324, 0.9915305, 0.1722651, 0.0925069, 0.0])
    # 7 printed digits
    torch.testing.assert_close(sigmas[[0, 1, 2, -3, -2, -1]], expected, rtol=0, atol=6e-8)


@pytest.mark.parametrize(
    ("shift", "boundary", "num_high"),
    [pytest.param(12.0, 875, 26, id="t2v-a14b"), pytest.param(5.0, 900, 15, id="i2v-a14b")],
)
def test_a14b_experts_share_forty_steps_as_officially(shift: float, boundary: int, num_high: int) -> None:
    assert int((reset("unipc", 40, shift).timesteps >= boundary).sum()) == num_high


def test_dpmpp_starts_at_pure_noise() -> None:
    sampler = reset("dpm++", 50, 5.0)
    assert sampler.sigmas[0] == 1.0 and sampler.timesteps[0] == 1000
    assert sampler.timesteps.dtype == torch.int64


V1_GRIDS = [
    pytest.param(4, [1.0, 0.9375, 0.833333, 0.625], [], id="4-steps"),
    pytest.param(30, [1.0, 0.993151, 0.985915, 0.978261, 0.970149], [0.147059], id="30-steps"),
    pytest.param(
        50, [1.0, 0.995935, 0.991735, 0.987395, 0.982906], [0.241935, 0.172414, 0.092593], id="50-steps"
    ),
]


@pytest.mark.parametrize(("num_steps", "first", "last"), V1_GRIDS)
def test_euler_has_the_grid_of_v1(num_steps: int, first: list[float], last: list[float]) -> None:
    sampler = reset("euler", num_steps, 5.0)
    assert sampler.sigmas[: len(first)].tolist() == pytest.approx(first, abs=1e-6)  # 6 printed digits
    assert sampler.sigmas[-1 - len(last) : -1].tolist() == pytest.approx(last, abs=1e-6)
    assert sampler.timesteps.dtype == torch.float32
    assert torch.equal(sampler.timesteps, 1000 * sampler.sigmas[:-1])


@pytest.mark.parametrize(("shift", "first"), [(5.0, 0.92105), (3.0, 0.875), (1.0, 0.7)])
@pytest.mark.parametrize("name", ["euler", "dpm++"])
def test_strength_scales_the_grid_before_the_shift(name: str, shift: float, first: float) -> None:
    assert float(reset(name, 10, shift, 0.7).sigmas[0]) == pytest.approx(first, abs=5e-6)  # 5 printed digits


def test_strength_scales_the_lower_top_of_unipc() -> None:
    unshifted = 0.7 * 0.999
    first = 5 * unshifted / (1 + 4 * unshifted)
    assert float(reset("unipc", 10, 5.0, 0.7).sigmas[0]) == pytest.approx(first, abs=1e-7)  # float32


@EVERY_SAMPLER
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param((0, 5.0, 1.0), "num_inference_steps is 0; .* from 1", id="no-steps"),
        pytest.param((-3, 5.0, 1.0), "num_inference_steps is -3", id="negative-steps"),
        pytest.param((2.5, 5.0, 1.0), r"num_inference_steps is 2\.5; give a whole number", id="half-a-step"),
        pytest.param((4, 0.0, 1.0), "sigma_shift is 0.0; give a value above 0", id="no-shift"),
        pytest.param((4, -1.0, 1.0), "sigma_shift is -1.0", id="negative-shift"),
        pytest.param((4, math.nan, 1.0), "sigma_shift is nan", id="nan-shift"),
        pytest.param((4, math.inf, 1.0), "sigma_shift is inf", id="infinite-shift"),
        pytest.param((4, 1e9, 1.0), "do not fall: .* sigma_shift below 1e\\+09", id="shift-beyond-float32"),
        pytest.param((4, 5.0, 0.0), "denoising_strength is 0.0; .* above 0 and up to 1", id="no-strength"),
        pytest.param((4, 5.0, 1.5), "denoising_strength is 1.5", id="too-much-strength"),
        pytest.param((4, 5.0, math.nan), "denoising_strength is nan", id="nan-strength"),
    ],
)
def test_impossible_grid_says_what_to_give(
    name: str, arguments: tuple[int, float, float], words: str
) -> None:
    with pytest.raises(ArgumentError, match=words):
        SAMPLERS[name]().reset(*arguments)


@EVERY_SAMPLER
@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        pytest.param([], "one number per step", id="none"),
        pytest.param([[0.9, 0.5]], r"shape \(1, 2\)", id="two-dimensions"),
        pytest.param([0.9, 0.5, 0.0], r"sigmas\[2\] is 0.0; leave the final 0 out", id="final-zero"),
        pytest.param([0.9, 0.0, 0.5], r"sigmas\[1\] is 0.0; every noise level is above 0", id="zero-within"),
        pytest.param([0.9, -0.1], r"sigmas\[1\] is -0.1; every noise level is above 0", id="negative"),
        pytest.param([0.5, 0.9], r"sigmas\[0\] is 0.5, sigmas\[1\] is 0.9", id="rising"),
        pytest.param([0.9, 0.5, 0.5], r"sigmas\[1\] is 0.5, sigmas\[2\] is 0.5", id="repeated"),
        pytest.param([0.9, 0.9 - 1e-12], "do not fall", id="equal-in-float32"),
        pytest.param([1.1, 0.5], r"sigmas\[0\] is 1.1; a noise level is at most 1", id="above-one"),
        pytest.param([999.0, 500.0], r"sigmas\[0\] is 999.0; .* by 1000", id="timesteps-by-mistake"),
        pytest.param([0.9, math.nan], r"sigmas\[1\] is nan", id="nan"),
    ],
)
def test_impossible_sigmas_say_which_and_why(name: str, sigmas: list[float], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        SAMPLERS[name]().set_sigmas(sigmas)


@EVERY_SAMPLER
@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        pytest.param([900], r"shape \(1,\), there are 2 sigmas", id="too-few"),
        pytest.param([900, 500, 100], "there are 2 sigmas", id="too-many"),
        pytest.param([1001, 500], r"timesteps\[0\] is 1001", id="above-1000"),
        pytest.param([900.0, -1.0], r"timesteps\[1\] is -1.0", id="negative"),
        pytest.param([900.0, math.nan], r"timesteps\[1\] is nan", id="nan"),
    ],
)
def test_impossible_timesteps_say_which_and_why(name: str, timesteps: list[float], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        SAMPLERS[name]().set_sigmas([0.9, 0.5], timesteps)


@EVERY_SAMPLER
def test_failed_set_sigmas_leaves_the_grid_as_it_was(name: str) -> None:
    sampler = reset(name, 4, 5.0)
    before = sampler.sigmas.clone(), sampler.timesteps.clone()
    with pytest.raises(ArgumentError):
        sampler.set_sigmas([0.9, 0.5], [1])
    assert torch.equal(sampler.sigmas, before[0]) and torch.equal(sampler.timesteps, before[1])


@EVERY_SAMPLER
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_own_sigmas_replace_the_grid_and_get_the_final_zero(name: str, as_tensor: bool) -> None:
    own = [1.0, 0.876, 0.5]
    sampler = reset(name, 4, 5.0)
    sampler.set_sigmas(torch.tensor(own, dtype=torch.float64) if as_tensor else own)
    torch.testing.assert_close(sampler.sigmas, torch.tensor([*own, 0.0]), rtol=0, atol=0)
    expected = [1000, 876, 500]  # 1000 times the float64: as a float32 0.876 would be truncated to 875
    assert sampler.timesteps.tolist() == pytest.approx(expected, abs=1e-4 if name == "euler" else 0)


@EVERY_SAMPLER
def test_own_timesteps_are_what_the_network_is_told(name: str) -> None:
    sampler = SAMPLERS[name]()
    sampler.set_sigmas([0.9, 0.5], [900, 500])
    assert torch.equal(sampler.timesteps, torch.tensor([900, 500]))
    sampler.set_sigmas([0.9, 0.5], torch.tensor([899.5, 500.25], dtype=torch.float64))
    assert torch.equal(sampler.timesteps, torch.tensor([899.5, 500.25]))


@EVERY_SAMPLER
def test_grid_ignores_the_default_device_and_type(name: str) -> None:
    expected = reset(name, 20, 5.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            sampler = reset(name, 20, 5.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(sampler.sigmas, expected.sigmas) and torch.equal(sampler.timesteps, expected.timesteps)


def test_noise_lies_on_the_straight_line() -> None:
    latents, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(add_noise(latents, noise, torch.tensor(0.0)), latents)
    assert torch.equal(add_noise(latents, noise, torch.tensor(1.0)), noise)
    torch.testing.assert_close(add_noise(latents, noise, 0.25), 0.75 * latents + 0.25 * noise)


def test_each_sample_may_have_its_own_noise_level() -> None:
    latents, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    noisy = add_noise(latents, noise, torch.tensor([0.2, 0.9]))
    for index, sigma in enumerate([0.2, 0.9]):
        torch.testing.assert_close(noisy[index], add_noise(latents[index], noise[index], sigma))


def test_noise_keeps_the_type_of_the_latents() -> None:
    latents, noise = torch.randn(2, 3).bfloat16(), torch.randn(2, 3)
    assert add_noise(latents, noise, torch.tensor(0.5)).dtype == torch.bfloat16
    assert add_noise(latents, noise, torch.tensor([0.5, 0.6])).dtype == torch.bfloat16

"""What the networks are asked, and how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth.errors import ArgumentError
from diffsynth.models.wan.dit import WanDiT
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.step_caches import EverySecondStep
from tests.unit.pipelines.counting import calls_of


@pytest.mark.parametrize(("cfg_scale", "num_sides"), [(1.0, 1), (3.0, 2)])
def test_guidance_of_one_asks_one_side_only(
    toy_pipe: WanVideoPipeline, cfg_scale: float, num_sides: int
) -> None:
    with calls_of(toy_pipe.dit) as calls, calls_of(toy_pipe.text_encoder) as texts:
        toy_pipe("a red circle", cfg_scale=cfg_scale, num_inference_steps=3, seed=0, output_type="latent")
    assert [len(branches) for _, _, branches, *_ in calls] == [num_sides] * 3
    assert len(texts) == num_sides


def test_guidance_leads_away_from_the_negative_prompt(toy_pipe: WanVideoPipeline) -> None:
    def velocity(**arguments: object) -> Tensor:
        # one step from sigma 1 to 0 is noise minus velocity
        noise = torch.randn(1, 16, 2, 2, 4, generator=torch.Generator().manual_seed(0))
        return noise - toy_pipe(
            seed=None, latents=noise, num_inference_steps=1, output_type="latent", **arguments
        )

    toward, away = velocity(prompt="a red circle", cfg_scale=1.0), velocity(prompt="blurry", cfg_scale=1.0)
    both = velocity(prompt="a red circle", negative_prompt="blurry", cfg_scale=3.0)
    # float32 sums in another order, three times larger by the scale
    torch.testing.assert_close(both, away + 3.0 * (toward - away), atol=2e-5, rtol=0)


def test_keys_of_the_text_are_computed_once_per_generation(toy_pipe: WanVideoPipeline) -> None:
    assert isinstance(toy_pipe.dit, WanDiT)
    keys = [block.cross_attn.k for block in toy_pipe.dit.blocks]
    with calls_of(*keys) as calls, calls_of(toy_pipe.dit.text_embedding) as embedded:
        toy_pipe("a red circle", num_inference_steps=4, seed=0, output_type="latent")
    assert len(calls) == 2 * len(keys), "each block, for each side of the guidance"
    assert len(embedded) == 2


def test_two_experts_share_the_steps_as_official(two_experts: WanVideoPipeline) -> None:
    arguments = {"num_inference_steps": 40, "sigma_shift": 12.0, "sampler": "unipc", "seed": 0}
    assert isinstance(two_experts.dit, WanDiT) and isinstance(two_experts.dit2, WanDiT)
    with (
        calls_of(two_experts.dit) as high,
        calls_of(two_experts.dit2) as low,
        calls_of(two_experts.dit.text_embedding, two_experts.dit2.text_embedding) as prepared,
    ):
        two_experts("a red circle", output_type="latent", **arguments)
    # Wan2.2 T2V-A14B: 40 steps, shift 12, boundary 0.875
    assert (len(high), len(low)) == (26, 14)
    assert min(float(t.min()) for _, t, *_ in high) >= 875 > max(float(t.max()) for _, t, *_ in low)
    assert len(prepared) == 4, "one branch per expert and side"


def test_each_expert_has_its_own_guidance(two_experts: WanVideoPipeline) -> None:
    arguments = {"num_inference_steps": 4, "sigma_shift": 5.0, "seed": 0, "output_type": "latent"}
    with calls_of(two_experts.dit) as high, calls_of(two_experts.dit2) as low:
        two_experts("a red circle", cfg_scale=4.0, cfg_scale_low_noise=1.0, **arguments)
    assert {len(branches) for _, _, branches, *_ in high} == {2}
    assert {len(branches) for _, _, branches, *_ in low} == {1}
    same = two_experts("a red circle", cfg_scale=4.0, **arguments)
    assert torch.equal(same, two_experts("a red circle", cfg_scale=4.0, cfg_scale_low_noise=4.0, **arguments))


def test_the_boundary_can_be_moved(two_experts: WanVideoPipeline) -> None:
    for boundary, expected in ((0.0, (4, 0)), (1.0, (0, 4))):
        with calls_of(two_experts.dit) as high, calls_of(two_experts.dit2) as low:
            two_experts(
                "a red circle",
                switch_DiT_boundary=boundary,
                num_inference_steps=4,
                seed=0,
                output_type="latent",
            )
        # UniPC's first step stands at timestep 999
        assert (len(high), len(low)) == expected


# What is taken over whole is off by more than what is added to the tokens of now.
@pytest.mark.parametrize(("of_blocks", "num_walks", "bound"), [(True, 4, 1.0), (False, 2, 2.0)])
def test_a_step_cache_is_asked_and_answers(
    toy_pipe: WanVideoPipeline, of_blocks: bool, num_walks: int, bound: float
) -> None:
    assert isinstance(toy_pipe.dit, WanDiT)
    arguments = {"num_inference_steps": 4, "seed": 0, "output_type": "latent"}
    cache = EverySecondStep(of_blocks=of_blocks)
    with calls_of(toy_pipe.dit) as walks, calls_of(toy_pipe.dit.blocks[0]) as blocks:
        cached = toy_pipe("a red circle", step_cache=cache, **arguments)
    assert (len(walks), len(blocks)) == (num_walks, 4), "two sides at two of four steps"
    assert cache.begun == [(4, 2)]
    assert cache.asked == [(index, "high", side) for index in range(4) for side in (0, 1)]
    difference = (cached - toy_pipe("a red circle", **arguments)).abs().max()
    assert 0 < difference < bound
    again = toy_pipe("a red circle", step_cache=cache, **arguments)
    assert torch.equal(again, cached), "a generation begins with nothing"


def test_a_step_cache_has_one_memory_per_expert(two_experts: WanVideoPipeline) -> None:
    cache = EverySecondStep(of_blocks=True)
    two_experts("a red circle", step_cache=cache, num_inference_steps=4, seed=0, output_type="latent")
    assert set(cache.kept) == {("high", 0), ("high", 1), ("low", 0), ("low", 1)}


def test_what_is_no_step_cache_is_told_before_anything_runs(toy_pipe: WanVideoPipeline) -> None:
    with pytest.raises(ArgumentError, match="step_cache is a dict without begin, answer, recall"):
        toy_pipe("a red circle", step_cache={})

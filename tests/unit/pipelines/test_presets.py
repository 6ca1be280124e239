"""A preset sets what belongs together; what the caller gives wins, and is told."""

from __future__ import annotations

import logging

import pytest
import torch

from diffsynth.denoising.expert import Experts
from diffsynth.errors import ArgumentError
from diffsynth.pipelines.experts import step_counts
from diffsynth.pipelines.presets import PRESETS
from diffsynth.pipelines.request import read_request
from diffsynth.pipelines.wan_video import WanVideoPipeline


def test_four_steps_of_lightx2v(toy_pipe: WanVideoPipeline, two_experts: WanVideoPipeline) -> None:
    request = read_request({"prompt": "a", "preset": "lightx2v-4step"}, toy_pipe.parts, "official")
    assert request.options.sampler == "euler" and request.cfg_scale == request.cfg_scale_low_noise == 1.0
    sampler = request.sampler
    published = torch.tensor([1.0, 0.9375, 0.83333, 0.625])  # [1000, 750, 500, 250] / 1000 after a shift of 5
    assert torch.allclose(sampler.sigmas[:4].float(), published, atol=1e-5)
    assert two_experts.parts.high is not None
    for boundary in (0.875, 0.900):
        experts = Experts(two_experts.parts.high, two_experts.parts.low, boundary)
        assert [experts.name_at(t) for t in sampler.timesteps] == ["high", "high", "low", "low"]


def test_a_preset_makes_the_video_of_its_arguments(toy_pipe: WanVideoPipeline) -> None:
    common = {"prompt": "a red circle", "seed": 0, "output_type": "latent"}
    by_name = toy_pipe(**common, preset="lightx2v-4step")
    assert toy_pipe.last_settings["preset"] == "lightx2v-4step"
    by_hand = toy_pipe(**common, num_inference_steps=4, sigma_shift=5.0, cfg_scale=1.0, sampler="euler")
    assert isinstance(by_name, torch.Tensor) and isinstance(by_hand, torch.Tensor)
    assert torch.equal(by_name, by_hand)


def test_what_is_given_beside_a_preset_wins_and_is_logged(
    toy_pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"prompt": "a", "preset": "lightx2v-4step", "num_inference_steps": 6, "cfg_scale": 2.0}
    with caplog.at_level(logging.INFO, logger="diffsynth"):
        request = read_request(given, toy_pipe.parts, "official")
    assert request.options.num_inference_steps == 6 and request.options.sigma_shift == 5.0
    assert request.cfg_scale == request.cfg_scale_low_noise == 2.0
    lines = [record.getMessage() for record in caplog.records]
    assert "preset lightx2v-4step: num_inference_steps=6 as given, instead of 4." in lines
    assert "preset lightx2v-4step: cfg_scale=2.0 as given, instead of 1.0." in lines
    assert sum("instead of" in line for line in lines) == 2
    with caplog.at_level(logging.INFO, logger="diffsynth"):
        request = read_request(
            {"prompt": "a", "preset": "lightx2v-4step", "sigmas": [1.0, 0.5]}, toy_pipe.parts, "official"
        )
    assert len(request.sampler.timesteps) == 2
    assert any("sigmas= replaces its sigma_shift=5.0" in record.getMessage() for record in caplog.records)


def test_an_unknown_preset_lists_those_there_are(toy_pipe: WanVideoPipeline) -> None:
    with pytest.raises(ArgumentError, match=r"known: lightx2v-4step, wan2\.2-lightning-4step"):
        toy_pipe("a", preset="lightning")


def test_the_pair_preset_shares_its_steps_as_it_says(
    toy_pipe: WanVideoPipeline, two_experts: WanVideoPipeline
) -> None:
    for name, preset in PRESETS.items():
        if preset.num_high_steps is None:
            continue
        request = read_request({"prompt": "a", "preset": name}, two_experts.parts, "official")
        sampler = request.sampler
        counts = step_counts(two_experts.parts, request.options, sampler)
        assert counts == (preset.num_inference_steps, preset.num_high_steps)
        assert preset.lora_alpha is not None and set(preset.lora_alpha) == {"high", "low"}
        assert (request.cfg_scale, request.cfg_scale_low_noise) == (1.0, 1.0)
        assert step_counts(toy_pipe.parts, request.options, sampler) == (preset.num_inference_steps, None)


def test_every_preset_names_its_source() -> None:
    assert all(preset.source and preset.title for preset in PRESETS.values())

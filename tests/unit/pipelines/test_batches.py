"""A batch is the single calls, side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import ArgumentError
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.pipelines.counting import calls_of

PROMPTS = ["a red circle", "two small blue squares move right and then down"]
NEGATIVES = ["blurry", "still, grey, nothing at all"]
# float32; a batch takes other matrix kernels and pads shorter prompts, so sums come in another order:
# a few 1e-6 of latents that reach 5, after two steps of a random network
TOLERANCE = 5e-5


def test_prompts_times_videos_equal_single_calls(toy_pipe: WanVideoPipeline) -> None:
    batch = toy_pipe(PROMPTS, NEGATIVES, seed=7, num_videos_per_prompt=2, output_type="latent")
    assert batch.shape[0] == 4
    for index, sample in enumerate(batch):
        single = toy_pipe(PROMPTS[index // 2], NEGATIVES[index // 2], seed=7 + index, output_type="latent")
        torch.testing.assert_close(sample, single[0], atol=TOLERANCE, rtol=0)
    assert (batch[0] - batch[1]).abs().max() > 0.1, "two seeds, two videos"
    others = toy_pipe(PROMPTS, NEGATIVES[::-1], seed=7, num_videos_per_prompt=2, output_type="latent")
    assert (batch - others).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3, "each prompt has its own negative"


def test_one_negative_serves_all_prompts(toy_pipe: WanVideoPipeline) -> None:
    shared = toy_pipe(PROMPTS, "blurry", seed=0, output_type="latent")
    listed = toy_pipe(PROMPTS, ["blurry"] * 2, seed=0, output_type="latent")
    assert torch.equal(shared, listed)


def test_each_distinct_text_is_encoded_once(toy_pipe: WanVideoPipeline) -> None:
    with calls_of(toy_pipe.text_encoder) as calls:
        toy_pipe(["a red circle", "a  red   circle", "a square"], num_videos_per_prompt=2, seed=0)
    assert len(calls) == 3, "two prompts (blanks are no difference) and the empty negative"


def test_a_list_of_prompts_gives_a_list_of_videos(toy_pipe: WanVideoPipeline) -> None:
    def shape(videos: list) -> list[int]:
        return [len(video) for video in videos]

    single = toy_pipe(PROMPTS[0], seed=0)
    assert len(single) == 5 and all(isinstance(frame, Image.Image) for frame in single)
    assert shape(toy_pipe([PROMPTS[0]], seed=0)) == [5], "a list of one is a batch of one"
    assert shape(toy_pipe(PROMPTS, seed=0)) == [5, 5]
    assert shape(toy_pipe(PROMPTS[0], num_videos_per_prompt=3, seed=0)) == [5, 5, 5]
    first = toy_pipe([PROMPTS[0]], seed=0)[0]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, single, strict=True))


def test_wrong_counts_say_what_was_expected(toy_pipe: WanVideoPipeline) -> None:
    with pytest.raises(ArgumentError, match="negative_prompt has 3 texts for 2 prompts"):
        toy_pipe(PROMPTS, ["a", "b", "c"])
    with pytest.raises(ArgumentError, match="num_videos_per_prompt is 0"):
        toy_pipe("a", num_videos_per_prompt=0)
    rows = torch.randn(2, 4, 32)
    with pytest.raises(ArgumentError, match="negative_prompt_embeds has 3 rows; expected 1 or 2"):
        toy_pipe(prompt_embeds=rows, negative_prompt_embeds=torch.randn(3, 4, 32))

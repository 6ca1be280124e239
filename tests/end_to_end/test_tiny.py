"""The tiny Wan that ships does as it is told: its videos are measured, not admired."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from diffsynth import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from diffsynth.tiny.draw import draw_batch, draw_clip
from diffsynth.tiny.grammar import Scene, Thing, caption, random_scene
from diffsynth.tiny.measure import Tally, measure_clip, tally

CAPTIONS = 24


@pytest.fixture(scope="module")
def pipe() -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.float32, device="cpu")


def _captions(count: int, seed: int, num_frames: int = 17) -> list[str]:
    rng = random.Random(seed)
    return [caption(random_scene(rng, 1, num_frames), rng) for _ in range(count)]


def test_package_data_stays_small() -> None:
    files = [f for f in tiny_folder().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12_000_000


@pytest.fixture(scope="module")
def row(pipe: WanVideoPipeline) -> Tally:
    """A third of the captions by each sampler."""
    captions = _captions(CAPTIONS, seed=100)
    share, clips = CAPTIONS // 3, []
    for index, sampler in enumerate(("euler", "unipc", "dpm++")):
        texts = captions[index * share : (index + 1) * share]
        clips.extend(pipe(texts, seed=7 + index * share, sampler=sampler, output_type="np"))
    return tally("all", captions, clips, 1.0)


def test_videos_show_what_captions_say(row: Tally) -> None:
    # Over 200 captions (README): 100, 97, 94 and 93 %. Here two standard deviations of 24 draws less.
    assert row.colour >= 95 and row.count >= 95, row
    assert row.shape >= 90 and row.motion >= 84 and row.all_three >= 82, row


@pytest.mark.parametrize("num_frames", [5, 9, pytest.param(25, marks=pytest.mark.slow)])
def test_other_lengths_work(num_frames: int, pipe: WanVideoPipeline) -> None:
    captions = _captions(6, seed=num_frames, num_frames=num_frames)
    clips = pipe(captions, seed=3, num_frames=num_frames, output_type="np")
    assert clips.shape == (6, num_frames, 64, 64, 3)
    assert tally("unipc", captions, list(clips), 1.0).colour >= 66


def test_one_frame_is_a_picture(pipe: WanVideoPipeline) -> None:
    captions = [
        f"a {colour} {shape}" for colour, shape in (("red", "circle"), ("blue", "square"), ("green", "star"))
    ]
    clips = pipe(captions, seed=5, num_frames=1, output_type="np")
    found = [measure_clip(clip) for clip in clips]
    assert sum(bool(f) and f[0].colour in text for f, text in zip(found, captions, strict=True)) >= 2


def test_video_to_video_keeps_more_of_the_source_at_lower_strength(pipe: WanVideoPipeline) -> None:
    thing = Thing(shape="circle", colour="red", motion="right", x=20.0, y=30.0, radius=11.0)
    source = draw_clip(Scene(background="black", things=(thing,))).float() / 255
    errors = []
    for strength in (0.3, 0.6, 0.97):
        video = pipe(
            "a red circle moves right on a black background",
            input_video=source,
            denoising_strength=strength,
            seed=2,
            output_type="pt",
        )
        errors.append(float((video[0] - source).abs().mean()))
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.03


@pytest.mark.parametrize(
    "decibels",
    [
        28,
        pytest.param(
            32, marks=pytest.mark.xfail(reason="its decoder is not trained far enough", strict=True)
        ),
    ],
)
def test_vae_brings_back_held_out_clips(decibels: int, pipe: WanVideoPipeline) -> None:
    rng = random.Random(987)
    for num_frames in (17, 25):
        video = draw_batch([random_scene(rng, 1 + i % 2, num_frames) for i in range(4)], num_frames)
        with torch.no_grad():
            back = pipe.vae.decode(pipe.vae.encode(video)).clamp(-1, 1)
        mse = (back - video).square().mean(dim=(1, 2, 3, 4)) / 4
        assert float((-10 * mse.log10()).mean()) >= decibels, f"{num_frames} frames"


def test_latents_have_the_official_statistics(pipe: WanVideoPipeline) -> None:
    rng = random.Random(654)
    video = draw_batch([random_scene(rng) for _ in range(16)])
    with torch.no_grad():
        latents = pipe.vae.encode(video)
    assert latents.mean().abs() < 0.15 and 0.8 < latents.std() < 1.2


def test_the_same_seed_gives_the_same_frames(pipe: WanVideoPipeline, tmp_path: Path) -> None:
    first, second = (
        pipe("a green star grows", seed=1, num_inference_steps=4, output_type="np") for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_unknown_words_are_named(pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe("a red elephant", seed=1, num_inference_steps=1, output_type="latent")
    assert "elephant" in caplog.text and "circle" in caplog.text

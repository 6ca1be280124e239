"""The yardstick itself: it must read drawn clips without fault before it may judge made ones."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffsynth.tiny import measure
from diffsynth.tiny.draw import draw_clip
from diffsynth.tiny.grammar import (
    BACKGROUNDS,
    COLOURS,
    TAUGHT_COLOURS,
    Said,
    SaidThing,
    Scene,
    Thing,
    caption,
    parse_caption,
    random_scene,
    recoloured,
)
from diffsynth.tiny.measure import judge, main, measure_clip
from diffsynth.tiny.tracks import FOREGROUND_DISTANCE, label_components

PARTS = ("colour", "shape", "motion", "background", "count")


def said_of(scene: Scene) -> Said:
    things = tuple(SaidThing(shape=t.shape, colour=t.colour, motion=t.motion) for t in scene.things)
    return Said(things=things, background=scene.background)


def frames_of(clip: torch.Tensor) -> np.ndarray:
    return clip.permute(0, 2, 3, 1).numpy()


def spoil(clip: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Blur, brighten or darken by 5 %, and add noise, as a small VAE does."""
    kernel = torch.tensor([0.24, 0.52, 0.24])
    kernel = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    soft = functional.conv2d(functional.pad(clip.float(), (1,) * 4, mode="replicate"), kernel, groups=3)
    noise = torch.randn(soft.shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    return (soft * rng.choice((0.95, 1.05)) + 8 * noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize(("is_spoiled", "least"), [(False, 0.99), (True, 0.97)], ids=["drawn", "spoiled"])
@pytest.mark.parametrize("num_things", [1, 2])
def test_clips_are_read_right(num_things: int, is_spoiled: bool, least: float) -> None:
    rng = random.Random(1)
    verdicts = []
    for index in range(100):
        num_frames = (5, 9, 17, 25)[index % 4]
        scene = random_scene(rng, num_things, num_frames)
        clip = draw_clip(scene, num_frames)
        verdicts.append(
            judge(said_of(scene), measure_clip(frames_of(spoil(clip, rng) if is_spoiled else clip)))
        )
    for part in PARTS:
        assert np.mean([getattr(verdict, part) for verdict in verdicts]) >= least, part


def test_numbers_are_pixels_of_64_whatever_the_size() -> None:
    moving = Thing(shape="square", colour="blue", motion="right", x=20.0, y=40.0, radius=10.0)
    for size in (64, 128):
        (seen,) = measure_clip(frames_of(draw_clip(Scene(background="white", things=(moving,)), 17, size)))
        assert seen.travel == pytest.approx((21.6, 0.0), abs=0.3)
        assert (seen.x, seen.y) == pytest.approx((20.0, 40.0), abs=0.3)
        assert seen.area == pytest.approx(282, rel=0.03)
        assert seen.growth == pytest.approx(1.0, abs=0.02)


def test_every_form_of_frames_reads_the_same() -> None:
    clip = frames_of(draw_clip(random_scene(random.Random(2)), 9))
    expected = measure_clip(clip)
    assert measure_clip([Image.fromarray(frame) for frame in clip]) == expected
    assert measure_clip(list(clip)) == expected
    (seen,) = measure_clip(clip.astype(np.float32) / 255)
    assert (seen.shape, seen.colour, seen.motion) == (
        expected[0].shape,
        expected[0].colour,
        expected[0].motion,
    )


def test_an_empty_clip_shows_nothing() -> None:
    assert measure_clip(np.zeros((9, 64, 64, 3), np.uint8)) == []
    verdict = judge(parse_caption("a red circle"), [])
    assert not (verdict.colour or verdict.shape or verdict.motion or verdict.background or verdict.count)


def test_noise_is_not_taken_for_a_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    verdicts = [judge(parse_caption(f"a {colour} star moves up"), measure_clip(noise)) for colour in COLOURS]
    assert not any(verdict.all_three for verdict in verdicts)


def test_a_wrong_shape_of_clip_says_which_to_give() -> None:
    with pytest.raises(ValueError, match="give \\(frames, height, width, 3\\)"):
        measure_clip(np.zeros((3, 64, 64), np.uint8))


def test_each_wrong_attribute_is_told_apart() -> None:
    scene = random_scene(random.Random(0))
    (shown,) = measure_clip(frames_of(draw_clip(scene)))
    other = {"colour": "pink", "shape": "star", "motion": "shrink"}
    for part, value in other.items():
        right = {"colour": shown.colour, "shape": shown.shape, "motion": shown.motion}
        assert right[part] != value
        verdict = judge(Said(things=(SaidThing(**(right | {part: value})),), background=None), [shown])
        assert [name for name in other if not getattr(verdict, name)] == [part]
        assert not verdict.all_three


def test_two_things_may_be_told_in_either_order() -> None:
    scene = random_scene(random.Random(4), 2)
    said = said_of(scene)
    swapped = Said(things=said.things[::-1], background=None)
    measured = measure_clip(frames_of(draw_clip(scene)))
    assert judge(said, measured).all_three and judge(swapped, measured).all_three
    assert not judge(said, measured[:1]).all_three
    assert not judge(Said(things=said.things[:1], background=None), measured).count


def test_colours_are_far_enough_from_every_background() -> None:
    for colour in COLOURS.values():
        for background in BACKGROUNDS.values():
            assert np.linalg.norm(np.subtract(colour, background)) > 2 * FOREGROUND_DISTANCE


def test_components_touch_across_rows_and_frames_but_not_corners() -> None:
    mask = np.zeros((3, 4, 6), dtype=bool)
    mask[0, 0, :3] = mask[0, 1:3, 2] = True  # an L in frame 0 ...
    mask[1, 2, 2:5] = True  # ... goes on in frame 1
    mask[0, 3, 3] = mask[2, 0, 5] = True  # a corner, and far away
    labels = label_components(mask)
    assert (labels >= 0).tolist() == mask.tolist()
    assert len({labels[0, 0, 0], labels[0, 2, 2], labels[1, 2, 4]}) == 1
    assert len(set(labels[mask].tolist())) == 3


def test_components_of_a_snake_are_one() -> None:
    mask = np.zeros((1, 41, 41), dtype=bool)
    mask[0, ::2] = True
    mask[0, 1::4, -1] = mask[0, 3::4, 0] = True
    assert set(label_components(mask)[mask].tolist()) == {0}
    assert (label_components(np.zeros((2, 3, 3), dtype=bool)) == -1).all()


class DrawingPipeline:
    """Stands for the pipeline: draws what the captions say."""

    asked: ClassVar[list[dict]] = []

    @classmethod
    def from_pretrained(cls, folder: str, **given: object) -> DrawingPipeline:
        return cls()

    def __call__(self, prompt: list[str], num_frames: int, **given: object) -> list[np.ndarray]:
        self.asked.append({"prompts": len(prompt), **given})
        clips = []
        for index, text in enumerate(prompt):
            said, rng = parse_caption(text), random.Random(index)
            scene = random_scene(rng, len(said.things), num_frames)
            while [t.motion for t in scene.things] != [t.motion for t in said.things]:
                scene = random_scene(rng, len(said.things), num_frames)
            things = tuple(
                Thing(shape=s.shape, colour=str(s.colour), motion=s.motion, x=t.x, y=t.y, radius=t.radius)
                for s, t in zip(said.things, scene.things, strict=True)
            )
            drawn = draw_clip(Scene(background=said.background or "black", things=things), num_frames)
            clips.append(frames_of(drawn).astype(np.float32) / 255)
        return clips


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> type[DrawingPipeline]:
    found = SimpleNamespace(WanVideoPipeline=DrawingPipeline)
    monkeypatch.setattr(
        measure.importlib, "import_module", lambda name: found if name == "diffsynth" else None
    )
    monkeypatch.setattr(DrawingPipeline, "asked", [])
    return DrawingPipeline


def test_the_command_writes_a_row_per_sampler_and_number_of_shapes(
    drawing: type[DrawingPipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--captions", "7", "--batch", "5", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["sampler"], row["num_things"]) for row in rows] == [
        (sampler, things) for things in (1, 2) for sampler in ("euler", "unipc", "dpm++")
    ]
    assert all(row["all_three"] == row["background"] == 100.0 for row in rows)
    assert [asked["prompts"] for asked in drawing.asked[:2]] == [5, 2]
    assert [asked["seed"] for asked in drawing.asked[:2]] == [0, 5]


def test_the_command_writes_a_table(
    drawing: type[DrawingPipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--captions", "3", "--num-frames", "9", "--sampler", "unipc", "--no-two-shapes"]) == 0
    title, row = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["sampler", "shapes", "captions"]
    assert row.split()[:4] == ["unipc", "1", "3", "100.0%"]
    assert len(drawing.asked) == 1


@pytest.mark.parametrize("colour", list(TAUGHT_COLOURS))
def test_a_colour_that_only_a_lora_can_teach_is_drawn_said_and_measured(colour: str) -> None:
    scene = recoloured(random_scene(random.Random(1)), colour)
    asked = parse_caption(caption(scene, random.Random(2)))
    assert asked.things[0].colour == colour
    assert measure_clip(frames_of(draw_clip(scene)))[0].colour == colour

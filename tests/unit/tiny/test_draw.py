"""Clips of the tiny Wan's scenes."""

from __future__ import annotations

import random

import pytest
import torch

from diffsynth.tiny.draw import coverage, draw_batch, draw_clip
from diffsynth.tiny.grammar import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SPEED, Scene, Thing, random_scene


def thing(shape: str = "circle", motion: str = "still", radius: float = 10.0) -> Thing:
    return Thing(shape=shape, colour="red", motion=motion, x=32.0, y=32.0, radius=radius)


def centre(cover: torch.Tensor) -> torch.Tensor:
    """(F, H, W) -> (F, 2), pixels."""
    places = torch.arange(cover.shape[-1]) + 0.5
    return torch.stack((cover.sum(1) @ places, cover.sum(2) @ places), 1) / cover.sum((1, 2)).view(-1, 1)


# Area of each shape of radius 1, from its formula; the edge's ramp of one pixel keeps the sum to within 2 %.
AREAS = {"circle": 2.659, "square": 2.822, "triangle": 1.75, "star": 1.625}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [64, 128])
def test_a_shape_covers_its_area(shape: str, size: int) -> None:
    covered = float(coverage(thing(shape), 1, size).sum()) / (size / 64) ** 2
    assert covered == pytest.approx(AREAS[shape] * 100, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_in_its_box_and_is_the_same_from_both_sides(shape: str) -> None:
    cover = coverage(thing(shape), 1)[0]
    assert torch.allclose(cover, cover.flip(1), atol=1e-4)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[21:43, 21:43] = False  # 32 -+ 10, and half a pixel of edge
    assert float(cover[outside].max()) == 0.0


@pytest.mark.parametrize("shape", ["triangle", "star"])
def test_pointed_shapes_point_up(shape: str) -> None:
    cover = coverage(thing(shape, radius=14.0), 1)[0]
    widths = (cover > 0.5).sum(1)
    rows = widths.nonzero().flatten()
    assert widths[rows[1]] < 5 < widths[rows[-2]]


def test_edges_are_smooth() -> None:
    cover = coverage(thing(), 1)
    assert 0.01 < float(((cover > 0.05) & (cover < 0.95)).float().mean()) < 0.03


@pytest.mark.parametrize("num_frames", [5, 9, 17, 25])
@pytest.mark.parametrize("motion", sorted(DIRECTIONS))
def test_a_moving_thing_goes_its_way_at_constant_speed(motion: str, num_frames: int) -> None:
    along = torch.tensor(DIRECTIONS[motion])
    start = 32.0 - along * SPEED * (num_frames - 1) / 2
    moving = Thing(
        shape="circle", colour="red", motion=motion, x=float(start[0]), y=float(start[1]), radius=9.0
    )
    steps = centre(coverage(moving, num_frames)).diff(dim=0)
    assert torch.allclose(steps, (along * SPEED).expand_as(steps), atol=0.05)  # edges fall between pixels


@pytest.mark.parametrize("num_frames", [5, 9, 17, 25])
@pytest.mark.parametrize(("motion", "radius", "ratio"), [("grow", 7.0, 2.0), ("shrink", 14.0, 0.5)])
def test_a_growing_thing_doubles_where_it_is(
    motion: str, radius: float, ratio: float, num_frames: int
) -> None:
    cover = coverage(thing(motion=motion, radius=radius), num_frames)
    sizes = cover.sum((1, 2)).sqrt()
    assert float(sizes[-1] / sizes[0]) == pytest.approx(ratio, rel=0.02)
    assert ((sizes.diff() > 0) if motion == "grow" else (sizes.diff() < 0)).all()
    assert torch.allclose(centre(cover), torch.tensor(32.0), atol=0.02)


def test_a_still_thing_does_not_change() -> None:
    clip = draw_clip(Scene(background="black", things=(thing(),)), 9)
    assert (clip == clip[:1]).all()


def test_a_clip_shows_the_named_colours() -> None:
    for background, rgb in BACKGROUNDS.items():
        clip = draw_clip(Scene(background=background, things=(thing(),)))
        assert clip.shape == (17, 3, 64, 64) and clip.dtype == torch.uint8
        assert tuple(clip[0, :, 0, 0].tolist()) == rgb
        assert tuple(clip[0, :, 32, 32].tolist()) == COLOURS["red"]


def test_a_batch_is_its_clips_in_the_range_of_the_vae() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng, 1 + index % 2, 9) for index in range(4)]
    batch = draw_batch(scenes, 9)
    assert batch.shape == (4, 3, 9, 64, 64) and batch.dtype == torch.float32
    for clip, scene in zip(batch, scenes, strict=True):
        expected = draw_clip(scene, 9).float().transpose(0, 1) / 127.5 - 1
        assert torch.allclose(clip, expected, atol=0.5 / 127.5 + 1e-6)  # uint8 rounds by half a level

"""Captions and scenes of the tiny Wan."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from diffsynth.errors import ArgumentError
from diffsynth.tiny.grammar import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    GAP,
    MARGIN,
    MOTIONS,
    SHAPES,
    Scene,
    Thing,
    caption,
    known_words,
    parse_caption,
    random_scene,
    unknown_words,
)


def thing(**changes: object) -> Thing:
    values = {"shape": "circle", "colour": "red", "motion": "right", "x": 20.0, "y": 32.0, "radius": 10.0}
    return Thing(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_things", [1, 2])
def test_captions_read_back_as_the_scene_they_tell(num_things: int) -> None:
    rng = random.Random(7)
    for _ in range(2000):
        scene = random_scene(rng, num_things)
        text = caption(scene, rng)
        said = parse_caption(text)
        told = [(t.shape, t.colour, t.motion) for t in said.things]
        assert told == [(t.shape, t.colour, t.motion) for t in scene.things], text
        assert said.background in (None, scene.background), text
        assert all(s.size in (None, t.size_word) for s, t in zip(said.things, scene.things, strict=True)), (
            text
        )
        assert not unknown_words(text), text


@pytest.mark.parametrize(
    ("text", "things", "background"),
    [
        ("a red circle moves right", [("red", "circle", "right")], None),
        ("A red circle moves to the right on a black background.", [("red", "circle", "right")], "black"),
        ("red circle, moving from right to left, grey background", [("red", "circle", "left")], "gray"),
        ("a white background with the star getting bigger", [(None, "star", "grow")], "white"),
        ("a red circle", [("red", "circle", "still")], None),
        (
            "a red circle and a blue star moves up",
            [("red", "circle", "still"), ("blue", "star", "up")],
            None,
        ),
        (
            "the red circle moves to the left while the red square falls. The background is brown.",
            [("red", "circle", "left"), ("red", "square", "down")],
            "brown",
        ),
        ("a cat on a sofa", [], None),
        ("", [], None),
    ],
)
def test_captions_are_read_as_people_write_them(
    text: str, things: list[tuple[str, str, str]], background: str | None
) -> None:
    said = parse_caption(text)
    assert [(t.colour, t.shape, t.motion) for t in said.things] == things
    assert said.background == background


def test_captions_say_the_background_when_told_to() -> None:
    rng = random.Random(0)
    scene = Scene(background="brown", things=(thing(),))
    assert all("brown" in caption(scene, rng, says_background=True).lower() for _ in range(50))
    assert not any("brown" in caption(scene, rng, says_background=False).lower() for _ in range(50))


def test_captions_come_in_many_wordings() -> None:
    rng = random.Random(0)
    scene = Scene(background="black", things=(thing(),))
    assert len({caption(scene, rng) for _ in range(1000)}) > 200


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17, 25, 81])
@pytest.mark.parametrize("num_things", [1, 2])
def test_things_stay_inside_the_picture_and_apart(num_things: int, num_frames: int) -> None:
    rng = random.Random(3)
    for _ in range(100):
        scene = random_scene(rng, num_things, num_frames)
        for frame in range(num_frames):
            places = [t.at(frame, num_frames) for t in scene.things]
            for x, y, radius in places:
                assert min(x, y) - radius > MARGIN - 1e-6
                assert max(x, y) + radius < CANVAS - MARGIN + 1e-6
            if num_things == 2:
                (x, y, radius), (other_x, other_y, other_radius) = places
                assert max(abs(x - other_x), abs(y - other_y)) >= radius + other_radius + GAP


def test_random_scenes_use_every_word() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(500)]
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert {s.things[0].shape for s in scenes} == set(SHAPES)
    assert {s.things[0].colour for s in scenes} == set(COLOURS)
    assert {s.things[0].motion for s in scenes} == set(MOTIONS)


def test_two_things_have_two_colours() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng, 2) for _ in range(200)]
    assert all(s.things[0].colour != s.things[1].colour for s in scenes)


def test_a_seed_gives_the_same_scene_and_caption() -> None:
    first, second = random.Random(11), random.Random(11)
    for _ in range(20):
        scene = random_scene(first, 2)
        assert scene == random_scene(second, 2)
        assert caption(scene, first) == caption(scene, second)


def test_words_outside_the_grammar_are_listed_once_in_order() -> None:
    assert unknown_words("A red Elephant moves 3 steps, elephant! 过曝") == ["elephant", "3", "steps", "过曝"]
    assert unknown_words("") == []
    assert {"circle", "grey", "moves", "background"} <= set(known_words())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"shape": "cube"}, "shape is 'cube'; give one of circle"),
        ({"colour": "mauve"}, "colour is 'mauve'; give one of red"),
        ({"motion": "spin"}, "motion is 'spin'; give one of left"),
    ],
)
def test_a_wrong_word_says_which_to_give(changes: dict[str, str], names: str) -> None:
    with pytest.raises(ArgumentError, match=names):
        thing(**changes)


def test_a_wrong_background_or_number_says_which_to_give() -> None:
    with pytest.raises(ArgumentError, match="background is 'red'; give one of black"):
        Scene(background="red", things=())
    with pytest.raises(ArgumentError, match="num_things is 3; a scene holds 1 or 2"):
        random_scene(random.Random(0), 3)


def test_the_grammar_loads_no_torch() -> None:
    code = "import sys, diffsynth.tiny.grammar; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What the tiny Wan can be told: scenes of coloured shapes that move, and the captions that describe them.

A scene is one or two things on a plain background. Lengths are pixels of a 64 x 64 picture whose x grows to
the right and y grows downwards; a thing's place is the middle of its bounding box. Every random choice comes
from the ``random.Random`` that the caller gives, so a seed always gives the same scenes and captions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from itertools import pairwise

from diffsynth.errors import ArgumentError

CANVAS = 64.0  # side of the picture in which scenes are described, pixels
SPEED = 1.35  # pixels per frame of a thing that moves: 21.6 over 17 frames, 32.4 over 25
GROWTH = 2.0  # a thing that grows ends this many times larger than it began, whatever the number of frames
MARGIN = 1.0  # pixels left free between a thing and the edge of the picture
GAP = 4.0  # pixels left free between two things, in every frame

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 30),
    "green": (30, 165, 50),
    "blue": (40, 70, 240),
    "yellow": (250, 230, 40),
    "purple": (145, 40, 190),
    "orange": (250, 130, 10),
    "cyan": (40, 210, 230),
    "pink": (255, 135, 195),
}
# Colours that the tiny Wan has never seen, for LoRAs to teach: measured as the others, drawn when asked for.
TAUGHT_COLOURS: dict[str, tuple[int, int, int]] = {"teal": (0, 120, 120), "lime": (130, 255, 0)}
ALL_COLOURS = COLOURS | TAUGHT_COLOURS
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "brown": (90, 55, 25),
}
MOTIONS = ("left", "right", "up", "down", "still", "grow", "shrink")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

SMALL_RADIUS, BIG_RADIUS = 10.0, 12.5  # at most this may be called small, at least this may be called big
SINGLE_RADII = (9.0, 14.0)  # of the only thing of a scene
PAIR_RADII = (8.0, 10.0)  # of each of two things
SINGLE_GROWING_RADII = (6.5, 7.5)  # the smaller end of a thing that grows or shrinks
PAIR_GROWING_RADII = (5.5, 6.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One shape: what it is, where it is in the first frame, and how it moves."""

    shape: str  # one of SHAPES
    colour: str  # one of ALL_COLOURS
    motion: str  # one of MOTIONS
    x: float  # middle of the bounding box in the first frame, pixels of 64
    y: float
    radius: float  # half the side of the bounding box in the first frame, pixels of 64
    speed: float = SPEED  # pixels per frame; read only by the four directions

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, tuple(ALL_COLOURS)),
            ("motion", self.motion, MOTIONS),
        ):
            if value not in known:
                raise ArgumentError(f"{name} is {value!r}; give one of {', '.join(known)}.")

    def at(self, frame: int, num_frames: int) -> tuple[float, float, float]:
        """Return (x, y, radius) in pixels in frame ``frame`` (from 0) of a clip of ``num_frames``."""
        along_x, along_y = DIRECTIONS.get(self.motion, (0.0, 0.0))
        share = frame / (num_frames - 1) if num_frames > 1 else 0.0
        radius = self.radius
        if self.motion == "grow":
            radius *= 1 + (GROWTH - 1) * share
        elif self.motion == "shrink":
            radius *= 1 - (1 - 1 / GROWTH) * share
        travel = self.speed * frame
        return self.x + along_x * travel, self.y + along_y * travel, radius

    @property
    def size_word(self) -> str | None:
        """Either "big", "small" or None; a thing that changes its size is neither."""
        if self.motion in ("grow", "shrink"):
            return None
        if self.radius <= SMALL_RADIUS:
            return "small"
        return "big" if self.radius >= BIG_RADIUS else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A plain background and the things on it."""

    background: str  # one of BACKGROUNDS
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ArgumentError(f"background is {self.background!r}; give one of {', '.join(BACKGROUNDS)}.")


def random_scene(rng: random.Random, num_things: int = 1, num_frames: int = 17) -> Scene:
    """Draw a scene whose things stay inside the picture, and apart, for ``num_frames`` frames.

    Two things have different colours. Speed is `SPEED` unless the clip is so long that it has to be lower.

    Raises:
        ArgumentError: when ``num_things`` is neither 1 nor 2.
    """
    if num_things not in (1, 2):
        raise ArgumentError(f"num_things is {num_things}; a scene holds 1 or 2.")
    background = rng.choice(tuple(BACKGROUNDS))
    colours = rng.sample(tuple(COLOURS), num_things)
    kinds = [(rng.choice(SHAPES), colour, rng.choice(MOTIONS)) for colour in colours]
    while True:
        things = tuple(
            _placed(rng, *kind, num_frames=num_frames, is_single=num_things == 1) for kind in kinds
        )
        if num_things == 1 or _are_apart(*things, num_frames=num_frames):
            return Scene(background=background, things=things)


def recoloured(scene: Scene, colour: str) -> Scene:
    """The same scene with its first thing in another colour, such as one of `TAUGHT_COLOURS`."""
    return replace(scene, things=(replace(scene.things[0], colour=colour), *scene.things[1:]))


def _placed(
    rng: random.Random, shape: str, colour: str, motion: str, *, num_frames: int, is_single: bool
) -> Thing:
    """Give a thing a size, and a place from which its motion does not leave the picture."""
    if motion in ("grow", "shrink"):
        smallest = rng.uniform(*(SINGLE_GROWING_RADII if is_single else PAIR_GROWING_RADII))
        largest = smallest * GROWTH
        radius = smallest if motion == "grow" else largest
    else:
        radius = largest = rng.uniform(*(SINGLE_RADII if is_single else PAIR_RADII))
    low, high = MARGIN + largest, CANVAS - MARGIN - largest
    speed = min(SPEED, (high - low) / max(1, num_frames - 1))
    start = []
    for along in DIRECTIONS.get(motion, (0.0, 0.0)):
        travel = along * speed * (num_frames - 1)
        start.append(rng.uniform(low - min(0.0, travel), high - max(0.0, travel)))
    return Thing(
        shape=shape, colour=colour, motion=motion, x=start[0], y=start[1], radius=radius, speed=speed
    )


def _are_apart(first: Thing, second: Thing, *, num_frames: int) -> bool:
    """Whether the bounding boxes of two things keep `GAP` pixels apart in every frame."""
    for frame in range(num_frames):
        x, y, radius = first.at(frame, num_frames)
        other_x, other_y, other_radius = second.at(frame, num_frames)
        if max(abs(x - other_x), abs(y - other_y)) < radius + other_radius + GAP:
            return False
    return True


# Words for every motion. Finite forms follow a subject ("a circle moves up"), the others stand beside it
# ("a circle moving up"). An empty phrase says that nothing moves.
FINITE: dict[str, tuple[str, ...]] = {
    "up": ("moves up", "moves upwards", "slides up", "is moving up", "goes up", "rises", "drifts up"),
    "down": ("moves down", "moves downwards", "slides down", "is moving down", "goes down", "falls", "sinks"),
    "still": ("", "", "stays still", "does not move", "is still", "stands still", "rests", "is not moving"),
    "grow": ("grows", "gets bigger", "becomes larger", "is growing", "grows larger", "expands"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "is shrinking", "is getting smaller"),
}
PARTICIPLE: dict[str, tuple[str, ...]] = {
    "up": ("moving up", "moving upwards", "sliding up", "going up", "rising", "drifting up"),
    "down": ("moving down", "moving downwards", "sliding down", "going down", "falling", "sinking"),
    "still": ("", "staying still", "standing still", "not moving", "resting"),
    "grow": ("growing", "getting bigger", "becoming larger", "expanding"),
    "shrink": ("shrinking", "getting smaller", "becoming smaller"),
}
for _side, _other in (("left", "right"), ("right", "left")):
    FINITE[_side] = (
        f"moves {_side}",
        f"moves to the {_side}",
        f"slides {_side}",
        f"goes {_side}",
        f"is moving {_side}",
        f"moves from {_other} to {_side}",
        f"drifts to the {_side}",
        f"travels {_side}",
    )
    PARTICIPLE[_side] = (
        f"moving {_side}",
        f"moving to the {_side}",
        f"sliding {_side}",
        f"going {_side}",
        f"drifting {_side}",
        f"moving from {_other} to {_side}",
    )
BEHIND = (
    " on a {}",
    " on a {}",
    " on a {}",
    " against a {}",
    " in front of a {}",
    " over a {}",
    ", {}",
    ". The background is {}.",
)
OPENINGS = ("", "", "", "", "a video of ", "an animation of ", "a clip of ", "a simple animation, ")

_MOTION_WORDS = {
    **dict.fromkeys(("left", "leftwards", "leftward"), "left"),
    **dict.fromkeys(("right", "rightwards", "rightward"), "right"),
    **dict.fromkeys(("up", "upwards", "upward", "rises", "rising", "rise"), "up"),
    **dict.fromkeys(("down", "downwards", "downward", "falls", "falling", "sinks", "sinking"), "down"),
    **dict.fromkeys(("grows", "growing", "bigger", "larger", "expands", "expanding"), "grow"),
    **dict.fromkeys(("shrinks", "shrinking", "smaller"), "shrink"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SaidThing:
    """What a caption asks of one thing; None where it says nothing."""

    shape: str
    colour: str | None
    motion: str  # "still" when the caption tells no motion
    size: str | None = None  # "big" or "small"


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a caption asks for, in the order of its words."""

    things: tuple[SaidThing, ...]
    background: str | None  # None: any of BACKGROUNDS is right


def caption(scene: Scene, rng: random.Random, *, says_background: bool | None = None) -> str:
    """Describe a scene in one of many wordings.

    Args:
        scene: one or two things.
        rng: chooses the words.
        says_background: None leaves it to chance, two captions in three say it.
    """
    if says_background is None:
        says_background = rng.random() < 2 / 3
    if rng.random() < 0.5:
        clauses = [_clause(thing, rng, FINITE) for thing in scene.things]
        joint = rng.choice((" and ", " and ", " while ", ", "))
        opening = ""
    else:
        clauses = [_clause(thing, rng, PARTICIPLE) for thing in scene.things]
        joint = rng.choice((" and ", " and ", ", "))
        opening = rng.choice(OPENINGS)
    if not opening and rng.random() < 0.08:
        opening = "there is "
    text = opening + joint.join(clauses)
    if says_background:
        text += _behind(scene.background, rng)
    return text[0].upper() + text[1:] if rng.random() < 0.15 else text


def _clause(thing: Thing, rng: random.Random, phrases: dict[str, tuple[str, ...]]) -> str:
    """One thing and its motion: "the big red circle slides right", "red circle, moving right"."""
    phrase = rng.choice(phrases[thing.motion])
    adjectives = [thing.colour]
    if thing.size_word is not None and rng.random() < 0.3:
        adjectives.insert(0, thing.size_word)
    if not phrase and rng.random() < 0.5:
        adjectives.insert(0, "still")
    article = rng.choices(("a", "the", ""), (0.7, 0.15, 0.15))[0]
    if article == "a" and adjectives[0][0] in "aeiou":
        article = "an"
    noun = " ".join(([article] if article else []) + adjectives + [thing.shape])
    comma = "," if phrases is PARTICIPLE and not article and rng.random() < 0.5 else ""
    return f"{noun}{comma} {phrase}" if phrase else noun


def _behind(background: str, rng: random.Random) -> str:
    """The words that tell the background, to follow the rest of a caption."""
    word = "grey" if background == "gray" and rng.random() < 0.3 else background
    form = rng.choice(BEHIND)
    return form.format(word if "is {}" in form else f"{word} background")


# ---- reading captions ----------------------------------------------------------


def parse_caption(text: str) -> Said:
    """Read what a caption of this grammar asks for; words it does not know are passed over.

    A thing ends where the next one's article begins, so "a red circle moves right and a blue star rises"
    gives the first motion to the circle. A caption without motion words asks for things that stay still.
    """
    words = (
        text.lower().replace("grey", "gray").replace("to the ", "to ").replace("the background", "background")
    )
    backgrounds = "|".join(BACKGROUNDS)
    found = re.search(rf"({backgrounds}) background|background is ({backgrounds})", words)
    background = (found[1] or found[2]) if found else None
    words = re.sub(rf"\b(an?|the)? *({backgrounds}) background|background is ({backgrounds})", "", words)
    words = re.sub(r"\bfrom (left|right)\b", "", words)
    tokens = re.findall(r"[a-z]+|,", words)
    nouns = [place for place, token in enumerate(tokens) if token in SHAPES]
    starts = [0]
    for before, after in pairwise(nouns):
        starts.append(_start_of_thing(tokens, before + 1, after))
    ends = [*starts[1:], len(tokens)]
    things = [
        _read_thing(tokens[start:end], tokens[noun])
        for start, noun, end in zip(starts, nouns, ends, strict=False)
    ]
    return Said(things=tuple(things), background=background)


def _start_of_thing(tokens: list[str], first: int, noun: int) -> int:
    """Where the words about ``tokens[noun]`` begin: at its article, else behind "and", "while" or a comma."""
    for marks in (("a", "an", "the"), ("and", "while", ",")):
        for place in range(noun - 1, first - 1, -1):
            if tokens[place] in marks:
                return place
    return first


def _read_thing(tokens: list[str], shape: str) -> SaidThing:
    """Read the words about one thing."""
    said = {
        "colour": [token for token in tokens[: tokens.index(shape)] if token in ALL_COLOURS],
        "motion": [_MOTION_WORDS[token] for token in tokens if token in _MOTION_WORDS],
        "size": [token for token in tokens[: tokens.index(shape)] if token in ("big", "small")],
    }
    return SaidThing(
        shape=shape,
        colour=said["colour"][-1] if said["colour"] else None,
        motion=said["motion"][-1] if said["motion"] else "still",
        size=said["size"][-1] if said["size"] else None,
    )


def known_words() -> tuple[str, ...]:
    """Return the words that captions of this grammar are made of, sorted."""
    phrases = [*BEHIND, *OPENINGS, *SHAPES, *COLOURS, *BACKGROUNDS]
    for table in (FINITE, PARTICIPLE):
        for choices in table.values():
            phrases.extend(choices)
    phrases.append("a an the and while there is big small still grey background")
    return tuple(sorted(set(re.findall(r"[a-z]+", " ".join(phrases).lower()))))


def unknown_words(prompt: str) -> list[str]:
    """Return the words of a prompt that the tiny Wan was never taught, in order, each once."""
    known = set(known_words())
    words = re.findall(r"[^\W\d_]+|\d+", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in known))

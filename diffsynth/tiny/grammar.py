"""What the tiny Wan can be told: scenes of coloured shapes that move, and the captions that describe them.

A scene is one or two things on a plain background. Lengths are pixels of a 64 x 64 picture whose x grows to
the right and y grows downwards; a thing's place is the middle of its bounding box. Every random choice comes
from the ``random.Random`` that the caller gives, so a seed always gives the same scenes and captions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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
    colour: str  # one of COLOURS
    motion: str  # one of MOTIONS
    x: float  # middle of the bounding box in the first frame, pixels of 64
    y: float
    radius: float  # half the side of the bounding box in the first frame, pixels of 64
    speed: float = SPEED  # pixels per frame; read only by the four directions

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, tuple(COLOURS)),
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

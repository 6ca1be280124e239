"""Draw scenes as clips: the data on which the tiny Wan was trained, and the yardstick that measures it.

Letters: B clips, F frames, H W height and width of a frame.
Every shape lies in a box from -1 to 1 and is told by a signed distance, negative inside. A convex polygon's
is the largest of the distances to its edges. A star is folded onto the half of one tip, which has a single
edge. The distance, in pixels, gives an edge one pixel wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffsynth.tiny.grammar import ALL_COLOURS, BACKGROUNDS, CANVAS, Scene, Thing

CIRCLE_RADIUS = 0.92  # in units of the thing's radius, so that all shapes look equally large
SQUARE_HALF_SIDE = 0.84
TRIANGLE_TIP, TRIANGLE_BASE = -0.9, 0.85  # heights of the tip and of the base, which is 2 wide
STAR_TIP = 1.0 / math.cos(math.radians(18.0))  # radius of the tips when the star is 2 wide
STAR_NOTCH = 0.5 * STAR_TIP  # radius of the inner corners
STAR_CENTRE = 0.1  # the middle of the star lies this far below the middle of its box


def _star_distance(x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to an upright star, after folding the plane five times onto half of its upper tip."""
    x, y = x.abs(), STAR_CENTRE - y  # y now grows upwards from the star's middle
    for degrees in (-36.0, 216.0):  # the two lines through the middle on which tips are mirrored
        normal_x, normal_y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        beyond = (normal_x * x + normal_y * y).clamp_(min=0.0)
        x, y = x - 2 * normal_x * beyond, y - 2 * normal_y * beyond
    x = x.abs()
    notch_x = STAR_NOTCH * math.sin(math.radians(36.0))
    notch_y = STAR_NOTCH * math.cos(math.radians(36.0))
    length = math.hypot(notch_x, STAR_TIP - notch_y)
    return x * ((STAR_TIP - notch_y) / length) + (y - STAR_TIP) * (notch_x / length)


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (F, H, W) to a shape in its box, negative inside; x is (F, 1, W), y is (F, H, 1)."""
    if shape == "circle":
        return (x * x + y * y).sqrt_() - CIRCLE_RADIUS
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE
    if shape == "triangle":
        height = TRIANGLE_BASE - TRIANGLE_TIP
        length = math.hypot(1.0, height)
        side = x.abs() * (height / length) - (y - TRIANGLE_TIP) * (1.0 / length)
        return torch.maximum(side, y - TRIANGLE_BASE)
    return _star_distance(x, y)


def coverage(thing: Thing, num_frames: int = 17, size: int = 64) -> Tensor:
    """Return how much of every pixel a thing covers: (F, H, W) float32 from 0 to 1."""
    track = torch.tensor([thing.at(frame, num_frames) for frame in range(num_frames)], dtype=torch.float32)
    centre_x, centre_y, radius = (column.view(-1, 1, 1) for column in track.unbind(1))
    pixel = CANVAS / size
    places = (torch.arange(size, dtype=torch.float32) + 0.5) * pixel
    x = (places.view(1, 1, -1) - centre_x) / radius
    y = (places.view(1, -1, 1) - centre_y) / radius
    return (0.5 - _distance(thing.shape, x, y) * (radius / pixel)).clamp_(0.0, 1.0)


def _paint(scene: Scene, num_frames: int, size: int) -> Tensor:
    """Return a clip as (3, F, H, W) float32 from 0 to 255; later things lie over earlier ones."""
    background = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32).view(3, 1, 1, 1)
    clip = background.expand(3, num_frames, size, size)
    for thing in scene.things:
        colour = torch.tensor(ALL_COLOURS[thing.colour], dtype=torch.float32).view(3, 1, 1, 1)
        clip = torch.lerp(clip, colour.expand_as(clip), coverage(thing, num_frames, size).unsqueeze(0))
    return clip


def draw_clip(scene: Scene, num_frames: int = 17, size: int = 64) -> Tensor:
    """Return a scene as a clip of ``num_frames`` frames: (F, 3, H, W) uint8."""
    return _paint(scene, num_frames, size).round().to(torch.uint8).transpose(0, 1).contiguous()


def draw_batch(scenes: Sequence[Scene], num_frames: int = 17, size: int = 64) -> Tensor:
    """Return scenes as one batch in the range that the VAE reads: (B, 3, F, H, W) float32 in [-1, 1]."""
    batch = torch.empty(len(scenes), 3, num_frames, size, size)
    for row, scene in zip(batch, scenes, strict=True):
        row.copy_(_paint(scene, num_frames, size))
    return batch.div_(127.5).sub_(1.0)

"""Read from the pixels of a clip what it shows, and count how often the tiny Wan does as it is told.

    python -m diffsynth.tiny.measure --captions 200 --steps 20

Letters: F frames, H W height and width. Lengths are pixels of a 64 x 64 frame, whatever the size of the clip.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffsynth.tiny import tiny_folder
from diffsynth.tiny.draw import coverage
from diffsynth.tiny.grammar import (
    CANVAS,
    SHAPES,
    SPEED,
    TAUGHT_COLOURS,
    Said,
    SaidThing,
    Thing,
    caption,
    parse_caption,
    random_scene,
    recoloured,
)
from diffsynth.tiny.tracks import Array, Track, as_pixels, background_colour, find_tracks, nearest_background

GROWS_FROM = 1.35  # last size over first; a thing that grows doubles, and the middle of 1 and 2 is 1.41
MOVES_FROM = 0.4 * SPEED  # pixels per frame
TEMPLATE_SIZE = 32  # side of the pictures in which shapes are compared
TEMPLATE_REACH = 1.15  # half that side, in square roots of the thing's area
TEMPLATE_BLURS = (0.0, 1.0, 2.0)  # pixels (standard deviation): a decoded clip is softer than a drawn one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SAMPLERS = ("euler", "unipc", "dpm++")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a clip shows of one thing."""

    shape: str
    colour: str
    motion: str
    background: str
    x: float  # centre of its area in the first frame, pixels of 64
    y: float
    travel: tuple[float, float]  # from the first to the last frame, pixels of 64; y grows downwards
    growth: float  # size in the last frame over size in the first
    area: float  # mean over the frames, pixels of 64 x 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Which parts of a caption a clip got right; with two things, of both at once."""

    colour: bool
    shape: bool
    motion: bool
    background: bool
    count: bool  # as many things as the caption names

    @property
    def all_three(self) -> bool:
        """Colour, shape and motion are right."""
        return self.colour and self.shape and self.motion


# ---- one clip ------------------------------------------------------------------


def measure_clip(frames: object) -> list[Measured]:
    """Return what a clip shows, the largest thing first; an empty clip gives an empty list.

    Args:
        frames: (F, H, W, 3) uint8 or float in [0, 1], or a list of frames (arrays or PIL pictures).
    """
    clip = as_pixels(frames)
    background = nearest_background(background_colour(clip))
    return [_measure_track(track, background) for track in find_tracks(clip)]


def _measure_track(track: Track, background: str) -> Measured:
    """Measure one thing from how it covers the frames."""
    num_frames, height, width = track.cover.shape
    areas = track.cover.sum(axis=(1, 2))
    seen = areas > 0.1 * areas.max()
    weights = np.maximum(areas, 1e-6)
    x = (track.cover.sum(axis=1) @ (np.arange(width) + 0.5)) / weights * (CANVAS / width)
    y = (track.cover.sum(axis=2) @ (np.arange(height) + 0.5)) / weights * (CANVAS / height)
    times = np.arange(num_frames)[seen]
    first_x, last_x = _line(times, x[seen], num_frames)
    first_y, last_y = _line(times, y[seen], num_frames)
    first_size, last_size = _line(times, np.sqrt(areas[seen]), num_frames)
    growth = last_size / max(first_size, 0.1 * last_size, 1e-6)
    travel = (last_x - first_x, last_y - first_y)
    return Measured(
        shape=_nearest_shape(track.cover[seen]),
        colour=track.colour,
        motion=_motion(travel, growth, num_frames),
        background=background,
        x=first_x,
        y=first_y,
        travel=travel,
        growth=growth,
        area=float(areas[seen].mean()) * CANVAS * CANVAS / (height * width),
    )


def _line(times: Array, values: Array, num_frames: int) -> tuple[float, float]:
    """Fit a straight line by least squares; return its values in the first and the last frame."""
    middle, mean = times.mean(), values.mean()
    spread = float(((times - middle) ** 2).sum())
    slope = float(((times - middle) * (values - mean)).sum()) / spread if spread > 0 else 0.0
    return float(mean - slope * middle), float(mean + slope * (num_frames - 1 - middle))


def _motion(travel: tuple[float, float], growth: float, num_frames: int) -> str:
    """Name a motion by what changes: the size, else the place, else nothing."""
    if growth > GROWS_FROM:
        return "grow"
    if growth < 1 / GROWS_FROM:
        return "shrink"
    along_x, along_y = travel
    if max(abs(along_x), abs(along_y)) < MOVES_FROM * max(1, num_frames - 1):
        return "still"
    if abs(along_x) > abs(along_y):
        return "right" if along_x > 0 else "left"
    return "down" if along_y > 0 else "up"


# ---- shapes --------------------------------------------------------------------


def _template(cover: Tensor) -> Tensor:
    """Cut a thing out of its frames (F, H, W) at one size, centred, and average: (TEMPLATE_SIZE,) * 2."""
    _, height, width = cover.shape
    area = cover.sum((1, 2)).clamp(min=1e-6)
    centre_x = (cover.sum(1) @ (torch.arange(width) + 0.5)) / area
    centre_y = (cover.sum(2) @ (torch.arange(height) + 0.5)) / area
    reach = TEMPLATE_REACH * area.sqrt()
    steps = (torch.arange(TEMPLATE_SIZE) + 0.5) * (2 / TEMPLATE_SIZE) - 1
    places_x = (centre_x.view(-1, 1, 1) + reach.view(-1, 1, 1) * steps.view(1, 1, -1)) * (2 / width) - 1
    places_y = (centre_y.view(-1, 1, 1) + reach.view(-1, 1, 1) * steps.view(1, -1, 1)) * (2 / height) - 1
    shape = (len(cover), TEMPLATE_SIZE, TEMPLATE_SIZE)
    grid = torch.stack((places_x.expand(shape), places_y.expand(shape)), dim=-1)
    cut = functional.grid_sample(cover.unsqueeze(1), grid, align_corners=False).squeeze(1)
    return (cut * (area / area.sum()).view(-1, 1, 1)).sum(0)


def _blurred(cover: Tensor, deviation: float) -> Tensor:
    """Blur (F, H, W) by a Gaussian of ``deviation`` pixels."""
    if deviation == 0:
        return cover
    reach = math.ceil(3 * deviation)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    kernel = kernel / kernel.sum()
    wide = functional.conv2d(cover.unsqueeze(1), kernel.view(1, 1, 1, -1), padding=(0, reach))
    return functional.conv2d(wide, kernel.view(1, 1, -1, 1), padding=(reach, 0)).squeeze(1)


@cache
def _templates() -> dict[str, Tensor]:
    """The four shapes at a middling size, sharp and soft: (number of blurs, TEMPLATE_SIZE, TEMPLATE_SIZE)."""
    found = {}
    for shape in SHAPES:
        thing = Thing(shape=shape, colour="red", motion="still", x=32.0, y=32.0, radius=10.0)
        sharp = coverage(thing, num_frames=1)
        found[shape] = torch.stack([_template(_blurred(sharp, deviation)) for deviation in TEMPLATE_BLURS])
    return found


def _nearest_shape(cover: Array) -> str:
    """Return the shape whose picture differs least from the thing's."""
    seen = _template(torch.from_numpy(cover))
    differences = {
        shape: float((known - seen).square().mean((1, 2)).min()) for shape, known in _templates().items()
    }
    return min(differences, key=lambda shape: differences[shape])


# ---- caption against clip ------------------------------------------------------


def judge(said: Said, measured: Sequence[Measured]) -> Verdict:
    """Compare what a caption asks for with what a clip shows.

    The largest things shown are compared, as many as were asked for, in the pairing that makes most right.
    When one is missing all is wrong; one too many is told by ``count`` alone.
    """
    wanted = len(said.things)
    shown = measured[:wanted]
    best = (False, False, False)
    for order in permutations(shown) if len(shown) == wanted else ():
        marks = [_marks(thing, seen) for thing, seen in zip(said.things, order, strict=True)]
        colour, shape, motion = (all(right) for right in zip(*marks, strict=True)) if marks else best
        best = max(best, (colour, shape, motion), key=sum)
    return Verdict(
        colour=best[0],
        shape=best[1],
        motion=best[2],
        background=bool(measured) and said.background in (None, measured[0].background),
        count=len(measured) == wanted,
    )


def _marks(thing: SaidThing, seen: Measured) -> tuple[bool, bool, bool]:
    """Whether colour, shape and motion of one thing are as asked."""
    return (
        thing.colour in (None, seen.colour),
        thing.shape == seen.shape,
        thing.motion == seen.motion,
    )


# ---- the tiny Wan against its captions -----------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """How often one sampler did as it was told; the five shares are in percent of its captions."""

    sampler: str
    num_things: int
    num_captions: int
    colour: float
    shape: float
    motion: float
    all_three: float
    background: float  # of the captions that name one
    count: float
    seconds_per_clip: float


def tally(sampler: str, captions: Sequence[str], clips: Sequence[object], seconds: float) -> Tally:
    """Judge every clip by its caption and count."""
    said = [parse_caption(text) for text in captions]
    verdicts = [judge(asked, measure_clip(clip)) for asked, clip in zip(said, clips, strict=True)]
    named = [verdict for asked, verdict in zip(said, verdicts, strict=True) if asked.background]

    def percent(part: str, among: Sequence[Verdict] = verdicts) -> float:
        return 100.0 * sum(bool(getattr(verdict, part)) for verdict in among) / max(1, len(among))

    return Tally(
        sampler=sampler,
        num_things=max(len(asked.things) for asked in said),
        num_captions=len(captions),
        colour=percent("colour"),
        shape=percent("shape"),
        motion=percent("motion"),
        all_three=percent("all_three"),
        background=percent("background", named),
        count=percent("count"),
        seconds_per_clip=seconds / len(captions),
    )


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m diffsynth.tiny.measure",
        description="Make clips of random captions with the tiny Wan; count how often they are right.",
    )
    add = parser.add_argument
    add("--model", default=str(tiny_folder()), help="folder of the model; default: the tiny Wan that ships")
    add("--captions", type=int, default=200, help="number of captions")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--sampler", choices=("all", *SAMPLERS), default="all")
    add("--cfg-scale", type=float, default=None, help="strength of guidance; default: the model's own")
    add("--seed", type=int, default=0, help="of the captions and of the noise")
    add("--num-frames", type=int, default=17)
    add("--batch", type=int, default=10, help="clips made at once")
    add(
        "--two-shapes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure captions with two shapes, in rows of their own",
    )
    add(
        "--colour", choices=tuple(TAUGHT_COLOURS), help="captions of this colour, which only a LoRA can teach"
    )
    add(
        "--lora",
        action="append",
        default=[],
        help="LoRA to load, at its own strength; may be repeated. Of two experts, what the names of the two "
        "files have in common loads both: NAME.safetensors for NAME_high_noise.safetensors and the other",
    )
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights")
    add("--device", default="cpu")
    add("--json", action="store_true", help="write one JSON object per row instead of a table")
    return parser.parse_args(words)


def _captions(
    rng: random.Random, count: int, num_things: int, num_frames: int, colour: str | None
) -> list[str]:
    scenes = (random_scene(rng, num_things, num_frames) for _ in range(count))
    return [caption(scene if colour is None else recoloured(scene, colour), rng) for scene in scenes]


def _write_row(row: Tally, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(asdict(row)) + "\n")
    else:
        shares = (row.colour, row.shape, row.motion, row.all_three, row.background, row.count)
        cells = "".join(f"{share:>11.1f}%" for share in shares)
        sys.stdout.write(
            f"{row.sampler:<8}{row.num_things:>7}{row.num_captions:>10}{cells}{row.seconds_per_clip:>9.2f}\n"
        )
    sys.stdout.flush()


def main(words: Sequence[str] | None = None) -> int:
    """Run the measurement that the arguments ask for, and write one row per sampler and number of shapes."""
    given = _arguments(words)
    # By name: this folder stands below the pipeline in the tree, and must not lean on it when imported.
    pipeline = importlib.import_module("diffsynth").WanVideoPipeline
    pipe = pipeline.from_pretrained(given.model, torch_dtype=DTYPES[given.dtype], device=given.device)
    for path in given.lora:
        pipe.load_lora(path)
    guidance = {} if given.cfg_scale is None else {"cfg_scale": given.cfg_scale}
    if not given.json:
        titles = ("colour", "shape", "motion", "all three", "background", "count")
        sys.stdout.write(f"{'sampler':<8}{'shapes':>7}{'captions':>10}")
        sys.stdout.write("".join(f"{title:>12}" for title in titles) + f"{'s/clip':>9}\n")
    for num_things in (1, 2) if given.two_shapes else (1,):
        rng = random.Random(given.seed)
        captions = _captions(rng, given.captions, num_things, given.num_frames, given.colour)
        for sampler in SAMPLERS if given.sampler == "all" else (given.sampler,):
            clips: list[object] = []
            began = time.perf_counter()
            for first in range(0, len(captions), given.batch):
                made = pipe(
                    prompt=captions[first : first + given.batch],
                    seed=given.seed + first,
                    num_inference_steps=given.steps,
                    sampler=sampler,
                    output_type="np",
                    height=64,
                    width=64,
                    num_frames=given.num_frames,
                    progress_bar_cmd=lambda steps, **_: steps,
                    **guidance,
                )
                clips.extend(made)  # an array adds itself to a list as to another array
            row = tally(sampler, captions, clips, time.perf_counter() - began)
            _write_row(row, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Find the things of a clip: pixels that differ from the background, followed through the frames.

Letters: F frames, H W height and width, N things. Colours are RGB from 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffsynth.tiny.grammar import ALL_COLOURS, BACKGROUNDS, CANVAS

Array = npt.NDArray[np.float32]

BORDER = 2  # width of the frame of pixels that tells the background
FOREGROUND_DISTANCE = 45.0  # RGB distance from the background; half the least of any colour on any background
MIN_AREA = 12.0  # pixels of a 64 x 64 frame; a thing that is smaller on average is taken for noise
MIN_SHARE = 0.15  # of the volume of the largest thing


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One thing through the clip."""

    colour: str  # nearest of ALL_COLOURS
    cover: Array  # (F, H, W) from 0 to 1: how much of every pixel the thing covers
    volume: float  # pixels covered, over all frames


def as_pixels(frames: object) -> Array:
    """Return a clip as (F, H, W, 3) float32 from 0 to 255.

    Args:
        frames: (F, H, W, 3) uint8, or floats in [0, 1]; or a list of such frames or of PIL pictures.

    Raises:
        ValueError: when that is not the shape.
    """
    listed = [np.asarray(frame) for frame in frames] if isinstance(frames, Sequence) else np.asarray(frames)
    clip = np.stack(listed) if isinstance(listed, list) else listed
    if clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"a clip has shape {tuple(clip.shape)}; give (frames, height, width, 3).")
    pixels: Array = clip.astype(np.float32)
    return pixels if clip.dtype == np.uint8 else pixels * np.float32(255.0)


def background_colour(clip: Array) -> Array:
    """Return the middle colour of the pixels along the border of (F, H, W, 3): (3,)."""
    edge = np.ones(clip.shape[1:3], dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    middle: Array = np.median(clip[:, edge].reshape(-1, 3), axis=0).astype(np.float32)
    return middle


def nearest_background(colour: Array) -> str:
    """Return the name in BACKGROUNDS that is nearest to an RGB colour."""
    return _nearest(colour, BACKGROUNDS)


def _nearest(colour: Array, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(names[name]))))


def find_tracks(clip: Array) -> list[Track]:
    """Return the things in a clip (F, H, W, 3), the largest first.

    Pixels that touch within a frame, or in the same place one frame later, are one thing; so are pieces that
    have the same colour name, for two things of one scene never do.
    """
    background = background_colour(clip)
    contrast = np.linalg.norm(clip - background, axis=-1)
    labels = label_components(contrast > FOREGROUND_DISTANCE)
    sizes = np.bincount(labels[labels >= 0]) if (labels >= 0).any() else np.zeros(0, dtype=np.int64)
    scale = clip.shape[1] * clip.shape[2] / CANVAS**2
    least = max(MIN_AREA * scale * len(clip) / 4, MIN_SHARE * sizes.max(initial=0))
    pieces: dict[str, npt.NDArray[np.bool_]] = {}
    colours: dict[str, list[tuple[int, Array]]] = {}
    for label in np.flatnonzero(sizes >= least):
        piece = labels == label
        inner = contrast[piece] >= np.quantile(contrast[piece], 0.75)  # away from soft edges
        colour: Array = np.median(clip[piece][inner], axis=0).astype(np.float32)
        name = _nearest(colour, ALL_COLOURS)
        pieces[name] = pieces[name] | piece if name in pieces else piece
        colours.setdefault(name, []).append((int(sizes[label]), colour))
    tracks = []
    for name, piece in pieces.items():
        others = np.zeros_like(piece)
        for other, mask in pieces.items():
            if other != name:
                others |= mask
        near = _grown(_grown(piece)) & ~_grown(others)
        towards = max(colours[name], key=lambda found: found[0])[1] - background
        cover = np.clip((clip - background) @ towards / (towards @ towards), 0.0, 1.0) * (near | piece)
        cover[cover < 0.1] = 0.0  # noise of the background
        if cover.sum() >= MIN_AREA * scale * len(clip):
            tracks.append(Track(colour=name, cover=cover.astype(np.float32), volume=float(cover.sum())))
    return sorted(tracks, key=lambda track: -track.volume)


def _grown(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Widen a mask (F, H, W) by one pixel up, down, left and right."""
    wide: npt.NDArray[np.bool_] = mask.copy()
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    wide[:, :, 1:] |= mask[:, :, :-1]
    wide[:, :, :-1] |= mask[:, :, 1:]
    return wide


def label_components(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Number the connected parts of a mask (F, H, W) from 0; -1 where the mask is False.

    Rows are cut into runs of True pixels. Runs that touch in the next row or the next frame take the
    smaller of their numbers, until nothing changes.
    """
    before = np.zeros_like(mask)
    before[:, :, 1:] = mask[:, :, :-1]
    runs = np.cumsum(mask & ~before).reshape(mask.shape) - 1
    num_runs = int(runs.max(initial=-1)) + 1
    touching = []
    for axis in (0, 1):
        later = np.moveaxis(mask, axis, 0)[1:] & np.moveaxis(mask, axis, 0)[:-1]
        first, second = np.moveaxis(runs, axis, 0)[:-1][later], np.moveaxis(runs, axis, 0)[1:][later]
        touching.append(np.unique(first * num_runs + second))
    one, other = np.divmod(np.concatenate(touching), max(1, num_runs))
    number = np.arange(num_runs)
    while True:
        smaller = np.minimum(number[one], number[other])
        after = number.copy()
        np.minimum.at(after, one, smaller)
        np.minimum.at(after, other, smaller)
        after = after[after]
        if np.array_equal(after, number):
            break
        number = after
    _, compact = np.unique(number, return_inverse=True)
    labels = np.full(mask.shape, -1, dtype=np.int64)
    labels[mask] = compact[runs[mask]]
    return labels

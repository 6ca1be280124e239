"""Videos and masks that tell VACE what to make: inpaint, outpaint, extend, keep, boxes.

Each gives a `Source`: ``pipe(..., vace_video=source.video, vace_video_mask=source.mask)``. In a mask white is
made anew and black is kept; where nothing is known the video is grey. Boxes are (left, top, right, bottom) in
pixels. Nothing here imports torch.

Source: VACE ``vace/annotators`` (inpainting.py, outpainting.py, frameref.py, layout.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from diffsynth.errors import ArgumentError
from diffsynth.video.pixels import Frame, Frames, to_pil

Box: TypeAlias = tuple[float, float, float, float]
Track: TypeAlias = Mapping[int, Box]  # frame -> where the box stands then; between, it moves evenly

GREY = (128, 128, 128)
WHITE, BLACK = 255, 0
LINE_PIXELS = 3


class Source(NamedTuple):
    """What VACE is shown: as many pictures as masks, all of one size."""

    video: list[Image.Image]  # RGB
    mask: list[Image.Image]  # grey: white is made anew, black is kept


def inpaint(frames: Frames | Frame, mask: Frames | Frame) -> Source:
    """Make anew what a mask marks white; the rest is kept.

    Args:
        frames: the video.
        mask: as many pictures as ``frames``, or one for all of them; of the same size.

    Raises:
        ArgumentError: when numbers or sizes differ, or there is no frame.
    """
    video = _pictures(frames, "frames")
    masks = [picture.convert("L") for picture in _pictures(mask, "mask")]
    masks = masks * len(video) if len(masks) == 1 else masks
    if len(masks) != len(video):
        raise ArgumentError(
            f"mask has {len(masks)} pictures and frames {len(video)}; give as many, or one for all frames."
        )
    if masks[0].size != video[0].size:
        raise ArgumentError(
            f"mask is {_told(masks[0].size)} and frames are {_told(video[0].size)}; give one size."
        )
    grey = Image.new("RGB", video[0].size, GREY)
    holes = [picture.point(lambda level: WHITE if level > WHITE // 2 else BLACK) for picture in masks]
    return Source([Image.composite(grey, f, hole) for f, hole in zip(video, holes, strict=True)], masks)


def outpaint(
    frames: Frames | Frame, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> Source:
    """Show more of the scene, around the frames.

    Args:
        frames: the video.
        left: pixels added there; 0 adds none.
        top: as ``left``.
        right: as ``left``.
        bottom: as ``left``.

    Raises:
        ArgumentError: when nothing is added, a number is negative, or there is no frame.
    """
    added = (left, top, right, bottom)
    if min(added) < 0 or not any(added):
        raise ArgumentError(
            f"left, top, right, bottom are {added}; give pixels to add, 0 or more, at least one above 0."
        )
    video = _pictures(frames, "frames")
    width, height = video[0].size
    size = (left + width + right, top + height + bottom)
    pictures = []
    for frame in video:
        canvas = Image.new("RGB", size, GREY)
        canvas.paste(frame, (left, top))
        pictures.append(canvas)
    mask = Image.new("L", size, WHITE)
    mask.paste(BLACK, (left, top, left + width, top + height))
    return Source(pictures, [mask.copy() for _ in pictures])


def keep(places: Mapping[int, Frames | Frame], num_frames: int) -> Source:
    """Keep pictures or clips at places of a video, and make everything between them.

    Args:
        places: number of a frame -> the picture that stands there, or the clip that begins there. Negative
            numbers count from the end: -1 is the last frame.
        num_frames: of the whole video, 4 k + 1.

    Raises:
        ArgumentError: when a clip leaves the video, two overlap, sizes differ, or nothing is kept.
    """
    if num_frames < 1 or not places:
        raise ArgumentError(
            f"num_frames is {num_frames} and there are {len(places)} places; give 4 k + 1 frames, such as "
            "81, and one place or more: {0: picture}."
        )
    kept: dict[int, Image.Image] = {}
    for place, frames in places.items():
        clip = _pictures(frames, f"places[{place}]")
        first = place + num_frames if place < 0 else place
        if not 0 <= first <= num_frames - len(clip):
            raise ArgumentError(
                f"places[{place}] has {len(clip)} frames, which do not fit into {num_frames} from there on; "
                f"give a place from 0 to {num_frames - len(clip)}."
            )
        if taken := sorted(set(range(first, first + len(clip))) & set(kept)):
            raise ArgumentError(
                f"places[{place}] and another both decide frame {taken[0]}; give one of them."
            )
        kept.update(enumerate(clip, start=first))
    size = next(iter(kept.values())).size
    if odd := [number for number, picture in sorted(kept.items()) if picture.size != size]:
        raise ArgumentError(
            f"frame {odd[0]} is {_told(kept[odd[0]].size)} and others are {_told(size)}; give one size."
        )
    unknown = Image.new("RGB", size, GREY)
    return Source(
        [kept.get(number, unknown).copy() for number in range(num_frames)],
        [Image.new("L", size, BLACK if number in kept else WHITE) for number in range(num_frames)],
    )


def extend(
    first: Frames | Frame | None = None, last: Frames | Frame | None = None, *, num_frames: int
) -> Source:
    """Go on behind a first clip, lead to a last one, or join the two.

    Args:
        first: picture or clip with which the video begins.
        last: picture or clip with which it ends.
        num_frames: of the whole video, 4 k + 1.

    Raises:
        ArgumentError: as `keep`, and when neither is given.
    """
    if first is None and last is None:
        raise ArgumentError("extend() has neither first nor last; give the clip to go on from, or to reach.")
    places: dict[int, Frames | Frame] = {}
    if first is not None:
        places[0] = first
    if last is not None:
        clip = _pictures(last, "last")
        places[-len(clip)] = clip
    return keep(places, num_frames)


def layout(tracks: Sequence[Track] | Track, *, num_frames: int, height: int, width: int) -> Source:
    """Draw boxes that things follow: black lines on white, as VACE was taught.

    Args:
        tracks: of one thing or of several: ``{0: (10, 10, 60, 90), 80: (200, 10, 250, 90)}``.
        num_frames: 4 k + 1.
        height: in pixels.
        width: in pixels.

    Raises:
        ArgumentError: for a box that is none, or a frame outside of the video.
    """
    video = []
    for boxes in _boxes(tracks, num_frames):
        picture = Image.new("RGB", (width, height), "white")
        for box in boxes:
            ImageDraw.Draw(picture).rectangle(box, outline="black", width=LINE_PIXELS)
        video.append(picture)
    return Source(video, [Image.new("L", (width, height), WHITE) for _ in video])


def box_mask(
    tracks: Sequence[Track] | Track, *, num_frames: int, height: int, width: int
) -> list[Image.Image]:
    """Return a mask that is white inside of boxes, for `inpaint`; arguments as in `layout`."""
    masks = []
    for boxes in _boxes(tracks, num_frames):
        mask = Image.new("L", (width, height), BLACK)
        for box in boxes:
            ImageDraw.Draw(mask).rectangle(box, fill=WHITE)
        masks.append(mask)
    return masks


def _pictures(frames: Frames | Frame, name: str) -> list[Image.Image]:
    pictures = to_pil(frames)
    if not pictures:
        raise ArgumentError(f"{name} is empty; give one picture or more.")
    if odd := [picture for picture in pictures if picture.size != pictures[0].size]:
        raise ArgumentError(
            f"{name} holds pictures of {_told(pictures[0].size)} and {_told(odd[0].size)}; give one size."
        )
    return pictures


def _boxes(tracks: Sequence[Track] | Track, num_frames: int) -> Iterable[list[Box]]:
    """The boxes of each frame."""
    several = [tracks] if isinstance(tracks, Mapping) else list(tracks)
    if not several or num_frames < 1:
        raise ArgumentError(
            f"There are {len(several)} tracks and num_frames is {num_frames}; give one track or more, such "
            "as {0: (left, top, right, bottom)}, and one frame or more."
        )
    for track in several:
        _check_track(track, num_frames)
    return [[_box_at(track, number) for track in several] for number in range(num_frames)]


def _check_track(track: Track, num_frames: int) -> None:
    if not track:
        raise ArgumentError("A track holds no box; give {0: (left, top, right, bottom)}.")
    for number, box in track.items():
        if not 0 <= number < num_frames:
            raise ArgumentError(f"A box stands at frame {number}; give 0 to {num_frames - 1}.")
        if len(box) != 4 or box[2] <= box[0] or box[3] <= box[1]:
            raise ArgumentError(
                f"The box of frame {number} is {tuple(box)}; give (left, top, right, bottom), with right "
                "above left and bottom above top."
            )


def _box_at(track: Track, number: int) -> Box:
    """Where a box stands: evenly between the nearest places, still before the first and after the last."""
    numbers = sorted(track)
    sides = np.array([track[at] for at in numbers], dtype=np.float64)
    left, top, right, bottom = (float(np.interp(number, numbers, sides[:, i])) for i in range(4))
    return left, top, right, bottom


def _told(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

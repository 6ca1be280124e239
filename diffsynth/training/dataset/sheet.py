"""A contact sheet: what the trainer will see of each clip, with its words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from diffsynth.errors import DiffSynthError
from diffsynth.training.dataset.clips import Clip, DatasetPlan, Dropped
from diffsynth.training.dataset.reading import read_frames
from diffsynth.video import save_image
from diffsynth.video.contact_sheet import Cell, contact_sheet

MAX_CLIPS = 60


def write_sheet(
    plan: DatasetPlan, path: str | os.PathLike[str], *, max_clips: int = MAX_CLIPS
) -> list[Dropped]:
    """Draw the first and the middle frame of clips, cut and resized as in training.

    Args:
        plan: whose clips are shown: evenly spread, when there are more than ``max_clips``.
        path: a .png or .jpg, replaced when it is there.
        max_clips: at most so many.

    Returns:
        Clips that could not be decoded, with the reason; the sheet says so too.

    Raises:
        ArgumentError: when there is no clip.
        OutputPathError: when the sheet cannot be written.
    """
    undecodable: list[Dropped] = []
    save_image(contact_sheet(_cells(_spread(plan.clips, max_clips), undecodable)), path)
    return undecodable


def _spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    if len(clips) <= count:
        return list(clips)
    return [clips[number * len(clips) // count] for number in range(count)]


def _cells(clips: Sequence[Clip], undecodable: list[Dropped]) -> Iterator[Cell]:
    for clip in tqdm(clips, desc="contact sheet", unit="clip", disable=None):
        num_frames = len(clip.indices)
        title = f"{clip.item.name}  {num_frames} x {clip.width}x{clip.height}"
        title += "  mirrored" if clip.flip else ""
        try:
            pictures = read_frames(clip, sorted({0, num_frames // 2}))
        except DiffSynthError as error:
            undecodable.append(Dropped(media=clip.item.media, reason=str(error), dataset=clip.dataset))
            yield Cell(pictures=(), title=title, text=str(error))
            continue
        yield Cell(pictures=tuple(pictures), title=title, text=clip.item.caption)

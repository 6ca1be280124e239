"""From datasets to clips: headers are read, nothing is decoded, and what is left out is listed."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from diffsynth.errors import ArgumentError, DiffSynthError
from diffsynth.training.dataset.buckets import Size, size_groups
from diffsynth.training.dataset.clips import Clip, DatasetPlan, Dropped, Item, Note
from diffsynth.training.dataset.config import NATIVE, DatasetConfig
from diffsynth.training.dataset.cutting import UnusableError, clips_of, told_of
from diffsynth.training.dataset.items import LIST_PREFIX, Listing, list_items
from diffsynth.training.dataset.reading import read_frames
from diffsynth.video.paths import replacing
from diffsynth.video.probing import MediaFacts, probe_media

logger = logging.getLogger("diffsynth")

DROPPED_FILE = f"{LIST_PREFIX}dropped.txt"
CAPTIONS_FILE = f"{LIST_PREFIX}captions_missing.txt"
MAX_WORKERS = 8  # threads that read headers; ffmpeg lets go of Python's lock while it does
DECODED_AT_ONCE = 16  # frames, so that memory stays small
_SHOWN = 3  # reasons in an error's text, names in a note
# Facts of files -> what a note says of those that have them.
ODD = {
    "is_anamorphic": "have pixels that are not square: they get the proportions that players show",
    "is_hdr": "are HDR (PQ or HLG), and their levels are taken as they are, which is pale and flat: convert "
    "them to SDR first, by ffmpeg's zscale and tonemap",
    "is_interlaced": "are interlaced: what moves has combs at its edges. Deinterlace them first, by ffmpeg "
    "-vf bwdif",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What all datasets of a plan share."""

    model_fps: float  # frames per second
    grid: Size
    decode: bool


def plan_dataset(
    configs: Sequence[DatasetConfig],
    *,
    model_fps: float,
    grid: Size = (16, 16),
    workers: int | None = None,
    list_folder: Path | None = None,
    decode: bool = False,
) -> DatasetPlan:
    """Decide which frames, at which size, become samples.

    Args:
        configs: one dataset or more.
        model_fps: frames per second that the model was made for: 16, of TI2V-5B 24.
        grid: height and width that sizes are multiples of: VAE stride x patch; of TI2V-5B (32, 32).
        workers: threads that read headers; None: by the number of cores.
        list_folder: where files and reasons of what is left out are written; None: beside each dataset. Where
            that may not be written it is the system's temporary folder.
        decode: also decode every frame of every clip, which finds damage behind a good header; takes long.

    Returns:
        The plan: the same for the same files and configs, in the order in which they are listed.

    Raises:
        MediaNotFoundError: when a dataset is not there.
        ArgumentError: for a table that cannot be used, missing captions, sizes off the grid, no usable clip,
            or anything left out of a dataset that is ``strict``.
    """
    if not configs:
        raise ArgumentError("There is no dataset; give one or more.")
    for config in configs:
        size_groups(config, grid)  # raises before anything is read
    cut = Cut(model_fps=model_fps, grid=grid, decode=decode)
    listings = [list_items(config) for config in configs]
    lists: list[Path] = []
    for config, listing in zip(configs, listings, strict=True):
        _check_captions(config, listing, list_folder)
    facts = _probe(listings, workers)
    parts: list[DatasetPlan] = []
    dropped: dict[Path, dict[Dropped, None]] = {}  # by the folder of the list: datasets may share one
    for config, listing in zip(configs, listings, strict=True):
        items = tqdm(listing.items, desc="decoding", unit="file", disable=None if decode else True)
        part = _plan_one(config, listing, items, facts, cut)
        folder = list_folder or listing.root
        listed = dropped.setdefault(folder, {})
        listed |= dict.fromkeys(part.dropped)
        if (file := write_dropped(list(listed), folder, DROPPED_FILE)) is not None and file not in lists:
            lists.append(file)
        _check_usable(config, listing, part, lists)
        parts.append(part)
    return DatasetPlan(
        clips=_with_own_stems([clip for part in parts for clip in part.clips]),
        dropped=tuple(dropped for part in parts for dropped in part.dropped),
        notes=tuple(note for part in parts for note in part.notes),
        num_items=sum(part.num_items for part in parts),
        lists=tuple(lists),
        list_folder=list_folder or listings[0].root,
    )


def log_plan(plan: DatasetPlan) -> None:
    """Tell the log each file that was dropped, and what was not used of the others."""
    for dropped in plan.dropped:
        logger.warning("%s is not used: %s", dropped.media.name, dropped.reason)
    for note in plan.notes:
        logger.log(logging.WARNING if note.is_warning else logging.INFO, "%s", note)


def _probe(listings: Sequence[Listing], workers: int | None) -> dict[Path, MediaFacts | DiffSynthError]:
    """Headers of all files that a listing names, conditions included; or why one cannot be read."""
    files = dict.fromkeys(file for listing in listings for item in listing.items for file in _media_of(item))

    def look(file: Path) -> MediaFacts | DiffSynthError:
        try:
            return probe_media(file)
        except DiffSynthError as error:
            return error

    count = workers or min(MAX_WORKERS, (os.cpu_count() or 1) * 2)
    with ThreadPoolExecutor(max_workers=max(1, count)) as pool:
        seen = tqdm(pool.map(look, files), total=len(files), desc="headers", unit="file", disable=None)
        return dict(zip(files, seen, strict=True))


def _media_of(item: Item) -> list[Path]:
    """Files of an item: its own, and those of its inputs."""
    files = [item.media]
    for value in item.inputs.values():
        several = value if isinstance(value, tuple) else (value,)
        files += [file for file in several if isinstance(file, Path)]
    return files


def _plan_one(
    config: DatasetConfig,
    listing: Listing,
    items: Iterable[Item],
    facts: dict[Path, MediaFacts | DiffSynthError],
    cut: Cut,
) -> DatasetPlan:
    fps = None if config.fps == NATIVE else cut.model_fps if config.fps is None else float(config.fps)
    groups = size_groups(config, cut.grid)
    clips: list[Clip] = []
    dropped, notes = [*listing.dropped], [*listing.notes]
    for item in items:
        try:
            known = {file: _usable(facts[file]) for file in _media_of(item)}
            made = clips_of(item, known, config, dataset=listing.name, fps=fps, groups=groups)
            if cut.decode:
                _decode(made)
        except UnusableError as error:
            dropped.append(Dropped(media=item.media, reason=str(error), dataset=listing.name))
            continue
        clips += made
        if text := told_of(made, known[item.media], fps):
            notes.append(Note(media=item.media, text=text, dataset=listing.name))
    used = {clip.item.media: clip.item for clip in clips}.values()
    return DatasetPlan(
        clips=tuple(clips),
        dropped=tuple(dropped),
        notes=(*_of_all(listing.name, used, facts), *notes),
        num_items=len(listing.items) + len(listing.dropped),
    )


def _of_all(
    dataset: str, items: Iterable[Item], facts: Mapping[Path, MediaFacts | DiffSynthError]
) -> list[Note]:
    """What is odd in many files alike: one line of each kind."""
    known = {file: facts[file] for item in items for file in _media_of(item)}
    notes = []
    for name, text in ODD.items():
        files = [f.name for f, told in known.items() if isinstance(told, MediaFacts) and getattr(told, name)]
        if files:
            shown = (
                f"{len(files)} files ({', '.join(files[:_SHOWN])}{', ...' if files[_SHOWN:] else ''}) {text}"
            )
            is_mended = name == "is_anamorphic"
            notes.append(Note(media=None, text=shown, dataset=dataset, is_warning=not is_mended))
    return notes


def _decode(clips: Sequence[Clip]) -> None:
    """Raise UnusableError when a frame of a clip cannot be decoded."""
    try:
        for clip in clips:
            for start in range(0, len(clip.indices), DECODED_AT_ONCE):
                read_frames(clip, range(start, min(start + DECODED_AT_ONCE, len(clip.indices))))
    except DiffSynthError as error:
        raise UnusableError(str(error)) from error


def _usable(facts: MediaFacts | DiffSynthError) -> MediaFacts:
    if isinstance(facts, DiffSynthError):
        raise UnusableError(str(facts)) from facts
    return facts


def _check_captions(config: DatasetConfig, listing: Listing, list_folder: Path | None) -> None:
    missing = listing.without_caption
    if not missing:
        return
    if config.missing_captions != "error":
        if config.missing_captions == "empty":
            text = f"{len(missing)} files have no caption and are shown without words"
            listing.notes.append(Note(media=None, text=text, dataset=listing.name))
        return
    lines = [f"{item.place}\t{item.media}" for item in missing]
    file = write_list(lines, list_folder or listing.root, CAPTIONS_FILE)
    several = f"{len(missing)} of {len(listing.items)} files have no caption"
    raise ArgumentError(
        f"{listing.source}: {several}, the first is {missing[0].place}; all of them: {file}. Write a text "
        "for each, or set missing_captions to 'drop' or 'empty'."
    )


def _check_usable(config: DatasetConfig, listing: Listing, part: DatasetPlan, lists: Sequence[Path]) -> None:
    if part.clips and not (config.strict and part.dropped):
        return
    reasons = [f"{dropped.media.name}: {dropped.reason}" for dropped in part.dropped[:_SHOWN]]
    more = f"\n  ... {len(part.dropped) - _SHOWN} more in {lists[-1]}" if len(part.dropped) > _SHOWN else ""
    what = (
        f"{len(part.dropped)} of {part.num_items} files cannot be used, and strict refuses that"
        if part.clips
        else f"none of {part.num_items} files gives a usable clip"
    )
    shown = "".join(f"\n  {reason}" for reason in reasons) or " (repeats leaves none of them in)"
    raise ArgumentError(f"{listing.source}: {what}:{shown}{more}")


def write_dropped(dropped: Sequence[Dropped], folder: Path, name: str) -> Path | None:
    """Write files and reasons, a line each; None when nothing was dropped, and an old list is emptied."""
    lines = [f"{one.media}\t{one.reason}" for one in dropped]
    # A list of an earlier look at the same files does not stay: nothing of it is true any more.
    if lines:
        return write_list(lines, folder, name)
    if (folder / name).is_file():
        write_list([], folder, name)
    return None


def write_list(lines: Sequence[str], folder: Path, name: str) -> Path:
    """Write one line per file, whole or not at all; in the temporary folder where ``folder`` is read-only."""
    text = "".join(f"{' '.join(line.splitlines())}\n" for line in lines)
    places = [folder, Path(tempfile.gettempdir())]
    for place in places:
        target = place / name
        try:
            place.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return target
        except OSError:
            if place is places[-1]:
                raise
    raise AssertionError("there is a place")


def _with_own_stems(clips: Sequence[Clip]) -> tuple[Clip, ...]:
    """Clips whose stems differ: a number behind those that two datasets share."""
    counts: Counter[str] = Counter()
    named = []
    for clip in clips:
        counts[clip.stem] += 1
        number = counts[clip.stem]
        named.append(clip if number == 1 else dataclasses.replace(clip, stem=f"{clip.stem}~{number}"))
    return tuple(named)

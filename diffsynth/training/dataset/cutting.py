"""The clips of one item: windows in time, a size for each, and the matching frames of its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffsynth.training.dataset.buckets import Size, choose_size, cut_away, enlargement
from diffsynth.training.dataset.clips import Clip, Item
from diffsynth.training.dataset.columns import known_columns
from diffsynth.training.dataset.config import DatasetConfig
from diffsynth.training.dataset.windows import longest, nearest_in_time, resampled, share, starts
from diffsynth.video.probing import MediaFacts

_WORTH_TELLING = 0.01  # share of a picture cut off, or of its edge added


class UnusableError(Exception):
    """An item that no clip can be made of; the text is the reason."""


def clips_of(
    item: Item,
    facts: Mapping[Path, MediaFacts],
    config: DatasetConfig,
    *,
    dataset: str,
    fps: float | None,
    groups: Sequence[Sequence[Size]],
) -> list[Clip]:
    """Return the clips of one item.

    Args:
        item: as listed.
        facts: headers of its files.
        config: of its dataset.
        dataset: the dataset's name.
        fps: frames per second that clips show; None: every frame.
        groups: sizes; a clip is made for one of each group.

    Raises:
        UnusableError: when it is too short, or one of its inputs is.
    """
    own = facts[item.media]
    frames = (0,) if own.is_picture else resampled(own, fps)
    count = 1 if own.is_picture else longest(len(frames), config.num_frames)
    if count is None:
        raise UnusableError(_too_short(own, len(frames), fps, min(config.num_frames)))
    begins = starts(len(frames), count, config.clip, windows=config.windows, seed=config.seed, name=item.name)
    sizes = dict.fromkeys(choose_size(group, *own.shown_size) for group in groups)
    aspects = _input_aspects(item, facts)
    clips = []
    for begin in begins:
        indices = frames[begin : begin + count]
        inputs = _input_indices(item, facts, own, indices)
        for height, width in sizes:
            for flip in (False, True) if config.flip else (False,):
                stem = f"{item.name.replace('/', '__')}.{begin}-{begin + count - 1}.{width}x{height}"
                stem += ".flip" if flip else ""
                repeats = _repeats(config, stem)
                if repeats:
                    clips.append(
                        Clip(
                            item=item, dataset=dataset, stem=stem, indices=indices, input_indices=inputs,
                            height=height, width=width, resize=config.resize, flip=flip, repeats=repeats,
                            pixel_aspect=own.pixel_aspect, input_aspects=aspects,
                            weight=config.weight, caption_dropout=config.caption_dropout,
                            batch_size=config.own_batch_size,
                            steps=(config.from_step, config.until_step), moments=config.moments,
                        )
                    )  # fmt: skip
    return clips


def _input_aspects(item: Item, facts: Mapping[Path, MediaFacts]) -> dict[str, float]:
    files = {name: value for name, value in item.inputs.items() if isinstance(value, Path)}
    return {n: facts[file].pixel_aspect for n, file in files.items() if facts[file].pixel_aspect != 1}


def _repeats(config: DatasetConfig, stem: str) -> int:
    """Whole repeats, and one more for the share of clips that the rest of the number asks for."""
    whole = math.floor(config.repeats)
    return whole + (share(f"{config.seed}/repeat/{stem}") < config.repeats - whole)


def _too_short(facts: MediaFacts, length: int, fps: float | None, needed: int) -> str:
    if fps is None or length == facts.num_frames:
        return f"too short: {length} frames, the shortest clip takes {needed}"
    return (
        f"too short: {facts.num_frames} frames at {facts.fps:.4g} fps are {length} at {fps:.4g} fps, the "
        f"shortest clip takes {needed}"
    )


def _input_indices(
    item: Item, facts: Mapping[Path, MediaFacts], own: MediaFacts, indices: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Which frames of each input that is a video go with the frames of a clip."""
    kinds = known_columns() if item.inputs else {}
    found = {}
    for name, value in item.inputs.items():
        if kinds[name] == "video" and isinstance(value, Path):
            found[name] = _matching(name, value, facts[value], own, indices)
        for file in value if isinstance(value, tuple) else (value,):
            if kinds[name] != "video" and isinstance(file, Path) and not facts[file].is_picture:
                raise UnusableError(f"its {name} {file.name} is no picture")
    return found


def _matching(
    name: str, file: Path, facts: MediaFacts, own: MediaFacts, indices: Sequence[int]
) -> tuple[int, ...]:
    """The same frames of a video of the same length; else those shown at the same time."""
    if facts.num_frames == 1:
        return (0,) * len(indices)
    if facts.num_frames == own.num_frames:
        return tuple(indices)
    if facts.fps is None or own.fps is None:
        if max(indices) >= facts.num_frames:
            raise UnusableError(
                f"its {name} {file.name} has {facts.num_frames} frames, the clip reaches frame {max(indices)}"
            )
        return tuple(indices)
    times = [own.times_s[index] if own.times_s else index / own.fps for index in indices]
    end_s = facts.times_s[-1] if facts.times_s else (facts.num_frames - 1) / facts.fps
    if times[-1] > end_s + 1.0 / facts.fps:
        raise UnusableError(
            f"its {name} {file.name} ends at {end_s:.2f} s ({facts.num_frames} frames at {facts.fps:.4g} "
            f"fps), the clip at {times[-1]:.2f} s"
        )
    if facts.times_s:
        return tuple(nearest_in_time(facts.times_s, time_s) for time_s in times)
    return tuple(min(math.floor(time_s * facts.fps + 0.5), facts.num_frames - 1) for time_s in times)


def told_of(clips: Sequence[Clip], facts: MediaFacts, fps: float | None) -> str:
    """What of a file is not used, or changed, in words; "" when all of it is used as it is."""
    if not clips:
        return "left out by repeats"
    used = len({index for clip in clips for index in clip.indices})
    told = []
    if used < facts.num_frames:
        told.append(f"{facts.num_frames - used} of {facts.num_frames} frames unused")
    if fps is not None and facts.fps is None and not facts.is_picture:
        told.append("tells no rate: every frame is taken")
    if any(len(set(clip.indices)) < len(clip.indices) for clip in clips):
        told.append(f"{facts.fps:.4g} fps is slower than {fps:.4g}: frames are repeated")
    for clip in {(clip.height, clip.width): clip for clip in clips}.values():
        told += _told_of_size(clip, facts)
    return "; ".join(told)


def _told_of_size(clip: Clip, facts: MediaFacts) -> list[str]:
    size = (clip.height, clip.width)
    told = []
    shown_height, shown_width = facts.shown_size
    lost = cut_away(size, shown_height, shown_width)
    if lost > _WORTH_TELLING:
        how = {"cover": "cut off", "stretch": "stretched", "contain": "shown between black bars"}[clip.resize]
        is_wider = shown_width / shown_height > clip.width / clip.height
        what = f"{lost:.0%} of its {'width' if is_wider else 'height'} "
        told.append(what + how if clip.resize == "cover" else f"{how} ({shown_width}x{shown_height})")
    grown = enlargement(size, shown_height, shown_width)
    if grown > 1 + _WORTH_TELLING:
        told.append(f"enlarged {grown:.2f}x to {clip.width}x{clip.height}")
    return told

"""What a dataset is made of: items as listed, clips as trained, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from diffsynth.video.pixels import Resize

Bucket: TypeAlias = tuple[int, int, int]  # frames, height, width in pixels
Steps: TypeAlias = tuple[int, int]  # from the first to the one after the last, 0: no last one
Value: TypeAlias = str | float | Path | tuple[Path, ...] | tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One line of a table, or one file of a folder."""

    media: Path
    name: str  # as the table writes it, or the path inside of the folder
    caption: str
    inputs: Mapping[str, Value] = field(default_factory=dict)  # arguments of pipe(): files, numbers, texts
    place: str = ""  # "metadata.csv line 3", for messages


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Frames of one item, in one size: what becomes one sample."""

    item: Item
    dataset: str  # name
    stem: str  # a name that no other clip of the plan has
    indices: tuple[int, ...]  # frames of the file, in order; a frame may stand twice
    input_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of inputs that are videos
    height: int  # pixels
    width: int
    resize: Resize = "cover"
    flip: bool = False  # mirrored, left and right
    pixel_aspect: float = 1.0  # of the file: width of a pixel over its height
    input_aspects: Mapping[str, float] = field(default_factory=dict)  # of inputs whose pixels are not square
    repeats: int = 1  # how often an epoch shows it
    weight: float = 1.0  # of its loss
    caption_dropout: float = 0.0
    batch_size: int = 0  # samples of one pass on one GPU; 0: the run's
    steps: Steps = (0, 0)  # of the run that see it; 0 as the second: to the end
    moments: bool = False  # each step sees one of its later latents alone

    @property
    def bucket(self) -> Bucket:
        return len(self.indices), self.height, self.width

    def transform(self) -> dict[str, str | int | float]:
        """All that decides the pixels besides the files themselves."""
        told: dict[str, str | int | float] = {
            "frames": shown_indices(self.indices),
            "height": self.height,
            "width": self.width,
            "resize": self.resize,
            "flip": int(self.flip),
        }
        if self.pixel_aspect != 1:
            told["pixel aspect"] = round(self.pixel_aspect, 6)
        for name, aspect in sorted(self.input_aspects.items()):
            told[f"pixel aspect of {name}"] = round(aspect, 6)
        for name, indices in sorted(self.input_indices.items()):
            told[f"frames of {name}"] = shown_indices(indices)
        return told


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A file that no clip was made of."""

    media: Path
    reason: str
    dataset: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something that was not used, or used otherwise than one might think."""

    media: Path | None  # None: of the whole dataset
    text: str
    dataset: str = ""
    is_warning: bool = False  # the samples are probably not what one wants

    def __str__(self) -> str:
        return f"{self.media.name}: {self.text}" if self.media else f"{self.dataset}: {self.text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlan:
    """Every clip of all datasets, and what was left out and why."""

    clips: tuple[Clip, ...]
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[Note, ...] = ()
    num_items: int = 0  # as listed
    lists: tuple[Path, ...] = ()  # files that name what was left out
    list_folder: Path | None = None  # where more such files may go

    @property
    def buckets(self) -> dict[Bucket, int]:
        """Clips that an epoch shows in each bucket, repeats counted, in order of size."""
        counts: Counter[Bucket] = Counter()
        for clip in self.clips:
            counts[clip.bucket] += clip.repeats
        return {bucket: counts[bucket] for bucket in sorted(counts)}


def shown_indices(indices: Sequence[int]) -> str:
    """Frame numbers in short, without loss: "0-80", "0-160/2" (every second), "0,2,4-9", "5x3" (thrice)."""
    parts: list[str] = []
    at = 0
    while at < len(indices):
        first, end = indices[at], at + 1
        step = indices[end] - first if end < len(indices) else 0
        while end < len(indices) and indices[end] - indices[end - 1] == step:
            end += 1
        if end - at < 3:  # two in a row are written singly: the second may begin the next run
            parts.append(str(first))
            at += 1
            continue
        last = indices[end - 1]
        even = f"{first}-{last}" if step == 1 else f"{first}-{last}/{step}"
        parts.append(f"{first}x{end - at}" if step == 0 else even)
        at = end
    return ",".join(parts)

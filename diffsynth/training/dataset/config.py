"""What a dataset is, and what is taken of it: said by the user, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from diffsynth.errors import ArgumentError
from diffsynth.video.pixels import RESIZES, Resize

ClipPolicy: TypeAlias = Literal["first", "middle", "random", "uniform", "windows"]
Rate: TypeAlias = float | Literal["native"] | None
MissingCaptions: TypeAlias = Literal["error", "drop", "empty"]

POLICIES = ("first", "middle", "random", "uniform", "windows")
MISSING_CAPTIONS = ("error", "drop", "empty")
NATIVE: Final = "native"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """One dataset: where it lies, and which clips are made of it. A picture is a clip of one frame."""

    path: str  # a table (.csv, .tsv, .json, .jsonl), a folder with metadata.*, or a folder of media and .txt
    name: str = ""  # in logs and in the loss per dataset; "": that of the folder
    # Which frames: the "first" or "middle" ones, "random" (a function of seed and file), "uniform": clips
    # evenly spread over the video, "windows": clips end to end.
    clip: ClipPolicy = "first"
    windows: int = 1  # clips of each video, where there is room; 0 with clip="windows": all that fit
    seed: int = 0  # of random clips, and of the part of a broken number of repeats
    fps: Rate = (
        None  # frames per second that clips show; None: the model's; "native": every frame of the file
    )
    num_frames: tuple[int, ...] = (
        81,
    )  # duration buckets, each 4 k + 1; a video goes to the longest that it fills
    sizes: tuple[tuple[int, int], ...] = ((480, 832),)  # buckets of (height, width) in pixels
    aspects: tuple[str, ...] = ()  # "16:9": each size also with these proportions (width:height), area kept
    # With several sizes: a clip goes to "one", the nearest in its proportions, or to one of "each" resolution
    # (sizes of about the same area).
    resolutions: Literal["one", "each"] = "one"
    resize: Resize = "cover"  # "cover": cut in the middle; "stretch"; "contain": black bars
    # How often an epoch shows each clip; 2.5: half of them a third time, 0.25: the same quarter of them.
    repeats: float = 1.0
    from_step: int = 0  # of the run: steps before it do not see the dataset
    until_step: int = 0  # the first step that does not see it any more; 0: it is seen to the end
    # Each step sees one latent frame of a clip alone, any but the first: what a clip shows, with no frames
    # around it to tell. For text-to-video models.
    moments: bool = False
    weight: float = 1.0  # of the loss of its clips
    own_batch_size: int = 0  # samples of one pass on one GPU, such as more of pictures; 0: run.batch_size
    caption_dropout: float = 0.0  # share of steps at which a clip is shown without its caption, 0 to 1
    flip: bool = False  # also every clip mirrored; not for text, hands, or anything with a left and a right
    trigger: str = ""  # put in front of every caption, with a blank; "" leaves captions alone
    missing_captions: MissingCaptions = (
        "error"  # "drop" leaves such files out, "empty" takes them without words
    )
    strict: bool = False  # a file that cannot be used is an error; otherwise it is listed and left out

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_buckets()
        if not (math.isfinite(self.repeats) and self.repeats > 0):
            raise ArgumentError(f"repeats is {self.repeats}; give a number above 0 (1 shows each clip once).")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ArgumentError(f"weight is {self.weight}; give a number above 0, or leave the dataset out.")
        if self.own_batch_size < 0:
            raise ArgumentError(
                f"own_batch_size is {self.own_batch_size}; give 1 or more (0: run.batch_size)."
            )
        if self.from_step < 0 or (self.until_step != 0 and self.until_step <= self.from_step):
            raise ArgumentError(
                f"from_step is {self.from_step} and until_step {self.until_step}; give 0 or more, and an "
                "until_step above from_step (0: to the end)."
            )
        if self.moments and min(self.num_frames) < 5:
            raise ArgumentError(
                f"moments shows later latents and num_frames is {self.num_frames}; give 5 frames or more."
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ArgumentError(f"caption_dropout is {self.caption_dropout}; give 0 to 1 (0.1 is usual).")

    def _check_choices(self) -> None:
        for name, given, known in (
            ("clip", self.clip, POLICIES),
            ("resolutions", self.resolutions, ("one", "each")),
            ("resize", self.resize, RESIZES),
            ("missing_captions", self.missing_captions, MISSING_CAPTIONS),
        ):
            if given not in known:
                raise ArgumentError(f"{name} is {given!r}; known: {', '.join(known)}.")
        if self.windows < (0 if self.clip == "windows" else 1):
            raise ArgumentError(f"windows is {self.windows}; give 1 or more (0, all, with clip='windows').")
        if self.clip in ("first", "middle") and self.windows != 1:
            raise ArgumentError(
                f"windows is {self.windows} and clip {self.clip!r}, which is one clip of each video; give "
                "clip='uniform', 'random' or 'windows' for several."
            )
        if isinstance(self.fps, str) and self.fps != NATIVE:
            raise ArgumentError(
                f"fps is {self.fps!r}; give a number, 'native', or None for the model's rate."
            )
        if isinstance(self.fps, int | float) and not (math.isfinite(self.fps) and self.fps > 0):
            raise ArgumentError(f"fps is {self.fps}; give a number above 0, such as 16.")

    def _check_buckets(self) -> None:
        for name, given in (("num_frames", self.num_frames), ("sizes", self.sizes)):
            if not isinstance(given, tuple) or not given:
                raise ArgumentError(f"{name} is {given!r}; give a tuple of one bucket or more.")
            if len(set(map(str, given))) < len(given):
                raise ArgumentError(f"{name} is {given}, with a bucket twice; give each once.")
        for count in self.num_frames:
            check_num_frames(count)
        for size in self.sizes:
            numbers = size if isinstance(size, tuple) else ()
            if len(numbers) != 2 or not all(isinstance(edge, int) and edge >= 1 for edge in numbers):
                raise ArgumentError(
                    f"sizes holds {size!r}; give (height, width) in pixels, such as (480, 832)."
                )
        for aspect in self.aspects:
            ratio_of(aspect)
        if self.resolutions == "each" and len(self.sizes) < 2:
            raise ArgumentError(
                "resolutions is 'each' and sizes has one; give sizes of several areas, or leave it."
            )


def v1_dataset(
    path: str, *, num_frames: int = 81, height: int = 480, width: int = 832, strict: bool = False
) -> DatasetConfig:
    """A dataset as DiffSynth-Studio v1 took it: the first frames at the file's own rate, one size.

    Args:
        path: a folder with ``metadata.csv`` and ``train/``.
        num_frames: of each clip, 4 k + 1.
        height: pixels; pictures are cut in the middle.
        width: pixels.
        strict: an unusable file is an error.

    Source: DiffSynth-Studio 1.x ``examples/wanvideo/train_wan_t2v.py``: --num_frames, --height, --width.
    """
    return DatasetConfig(
        path=path, clip="first", fps=NATIVE, num_frames=(num_frames,), sizes=((height, width),), strict=strict
    )


def check_num_frames(count: int) -> None:
    """Make sure that a clip has 4 k + 1 frames, the only lengths that Wan's VAE codes.

    Raises:
        ArgumentError: with the two nearest lengths.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(f"num_frames is {count!r}; give 4 k + 1 frames, such as 81 (1 for pictures).")
    if count % 4 != 1:
        below = (count - 1) // 4 * 4 + 1
        raise ArgumentError(
            f"num_frames is {count}; Wan takes 4 k + 1 frames: {count} -> {below} or {below + 4}."
        )


def ratio_of(aspect: str) -> float:
    """Width over height of "16:9".

    Raises:
        ArgumentError: when it is no such thing.
    """
    try:
        width, height = (float(part) for part in aspect.split(":"))
        if width > 0 and height > 0 and math.isfinite(width / height):
            return width / height
    except (ValueError, AttributeError):
        pass
    raise ArgumentError(f"aspects holds {aspect!r}; give width:height, such as '16:9'.")

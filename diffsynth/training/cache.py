"""Encode every clip of a dataset once, ahead of training (data_process).

Each clip goes through the pipeline's own conditioners, as a generation with these arguments would, and its
latent beside them into one file; see `samples` for the file and `cache_keys` for its name. Text encoder on
the one hand, image encoder and VAE on the other come to the device once per `CacheConfig.block_clips` clips;
each distinct caption is encoded once. Threads decode ahead and write behind.

Clips that cannot be encoded are told to the log, and listed in a file beside the plan's own lists.

Many processes share the work by ``rank`` and ``world``: every file of the dataset belongs to one of them. A
process that is killed leaves only complete files, and goes on from there when it is started again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from diffsynth.errors import (
    ArgumentError,
    DiffSynthError,
    MediaReadError,
    MissingModelError,
    OutputPathError,
    UnusedInputError,
)
from diffsynth.training.cache_config import CacheConfig
from diffsynth.training.cache_encode import GB, Job, Tally, encode_all
from diffsynth.training.cache_hashes import FileHashes
from diffsynth.training.cache_keys import Maker, cached_files, folder_of, sample_path
from diffsynth.training.cache_lookup import CacheLookup
from diffsynth.training.cache_writer import remove_leftovers
from diffsynth.training.dataset.clips import Clip, DatasetPlan, Dropped
from diffsynth.training.dataset.columns import known_columns
from diffsynth.training.dataset.items import LIST_PREFIX
from diffsynth.training.dataset.planning import write_dropped
from diffsynth.training.dataset.reading import ClipPixels, read_clip
from diffsynth.training.samples import EncodedSample
from diffsynth.training.stopping import Stopped, Wishes
from diffsynth.video.paths import why_not_writable

if TYPE_CHECKING:
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger("diffsynth")

STOP_TOLD = "Ctrl-C: encoding stops after the clip at work, which is kept. Once more stops at once."
MAX_NAMED = 5  # files in one line of the log
NOT_ENCODED = f"{LIST_PREFIX}not_encoded"  # .txt, or with the number of a process that shares the work


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReport:
    """What one process did."""

    samples: tuple[Path, ...]  # of all clips of its share, in their order
    num_written: int
    num_kept: int  # were there already
    num_bytes: int  # written
    num_captions: int  # texts that were encoded
    dropped: tuple[Dropped, ...]  # clips without a sample, and why
    dropped_list: Path | None  # the file that names them
    stale: tuple[Path, ...]  # older samples of the same files, which training does not read
    removed_stale: bool
    seconds: float

    def __str__(self) -> str:
        text = (
            f"{self.num_written} clips encoded in {self.seconds:.0f} s ({self.num_bytes / GB:.2f} GB), "
            f"{self.num_kept} were there already, {len(self.dropped)} dropped"
            f"{f' (listed in {self.dropped_list})' if self.dropped_list else ''}."
        )
        if self.stale:
            what = "were removed" if self.removed_stale else "remain; remove_stale=True removes them"
            text += f" {len(self.stale)} older samples (other captions, sizes or encoders) {what}."
        return text


def process(
    plan: DatasetPlan,
    pipe: WanVideoPipeline,
    config: CacheConfig | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    read: Callable[[Clip], ClipPixels] = read_clip,
) -> CacheReport:
    """Encode the clips of a plan that have no sample yet.

    Args:
        plan: of the dataset.
        pipe: with VAE and text encoder, and the image encoder where the DiT looks at pictures. The DiT says
            what its samples hold; without one see `cache_facts.assuming`.
        config: where and how.
        rank: of this process.
        world: processes that share the work.
        read: decodes a clip, in threads.

    Raises:
        MissingModelError, UnusedInputError: for networks or inputs that do not fit each other.
        OutputPathError: when the disk is full or fails; everything written before is whole, and kept.
        MediaReadError: with ``strict``, for the first clip that cannot be encoded.
        ArgumentError: when no clip can be encoded.
    """
    config = config or CacheConfig()
    if not 0 <= rank < world:
        raise ArgumentError(f"rank is {rank} of {world} processes; give 0 to {world - 1}.")
    _check_parts(pipe.parts)
    clips = _share(plan.clips, rank, world, by_name=config.cache_dir is not None)
    _check_inputs(clips)
    start = time.monotonic()
    with tqdm(desc="hash", unit="file", disable=rank != 0) as bar:
        jobs, dropped = _jobs(clips, pipe.parts, config, rank, bar)
    folders = {job.path.parent for job in jobs}
    if leftovers := remove_leftovers(folders, world):
        logger.info("%d files that were cut off while they were written are removed.", len(leftovers))
    todo = _missing(jobs)
    _check_folders((job.path.parent for job in todo), config)
    _check_room(todo, pipe.parts, config)
    with tqdm(total=len(todo), desc="encode", unit="clip", disable=rank != 0) as bar:
        tally = Tally(bar=bar, strict=config.strict, dropped=dropped)
        with Wishes(STOP_TOLD if rank == 0 else "") as signals:
            num_captions = encode_all(todo, pipe, config, tally, read, lambda: signals.stopped_by is not None)
    if signals.stopped_by is not None:
        done = f"{tally.num_written} of {len(todo)} missing clips were encoded and are kept"
        raise Stopped(f"{done}; the same command goes on from there.", signals.stopped_by)
    lost = {clip.media for clip in tally.dropped}
    listed = _listed(tally.dropped, plan, config, rank, world)
    if clips and all(not job.path.exists() for job in jobs):
        reasons = "; ".join(sorted({d.reason for d in tally.dropped})[:3])
        text = f"None of the {len(clips)} clips could be encoded: {reasons}"
        if world == 1:
            raise ArgumentError(text)
        logger.error("Process %d of %d: %s", rank, world, text)  # others may have better ones
    stale = _stale(jobs, config, lost)
    report = CacheReport(
        samples=tuple(job.path for job in jobs if job.path.exists()), num_written=tally.num_written,
        num_kept=len({job.path for job in jobs}) - len(todo), num_bytes=tally.num_bytes,
        num_captions=num_captions, dropped=tuple(tally.dropped), dropped_list=listed, stale=stale,
        removed_stale=config.remove_stale, seconds=time.monotonic() - start,
    )  # fmt: skip
    logger.info("%s", report)
    return report


def _listed(
    dropped: Sequence[Dropped], plan: DatasetPlan, config: CacheConfig, rank: int, world: int
) -> Path | None:
    """Name the clips without a sample in a file; None when there is none, or no folder to put it into."""
    folder = plan.list_folder or (Path(config.cache_dir).expanduser() if config.cache_dir else None)
    name = f"{NOT_ENCODED}.txt" if world == 1 else f"{NOT_ENCODED}_{rank}.txt"
    return None if folder is None else write_dropped(dropped, folder, name)


def _check_parts(parts: PipelineComponents) -> None:
    if parts.vae is None:
        raise MissingModelError(
            f"Clips are encoded by the VAE, and none is loaded; load {parts.facts.vae_file}."
        )
    if parts.text_encoder is None or parts.tokenizer is None:
        raise MissingModelError(
            "Captions are encoded by the text encoder, and none is loaded; load "
            "models_t5_umt5-xxl-enc-bf16.pth."
        )
    if parts.facts.has_image_branch and parts.image_encoder is None:
        raise MissingModelError(
            "This DiT looks at pictures through the CLIP image encoder, and none is loaded; load "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."
        )


def _share(clips: Sequence[Clip], rank: int, world: int, *, by_name: bool) -> list[Clip]:
    """Clips of every ``world``-th file: all clips of a file, whose older samples are looked for, together."""
    files: dict[object, list[Clip]] = {}
    for clip in clips:
        files.setdefault(clip.item.media.name if by_name else clip.item.media, []).append(clip)
    return [clip for group in islice(files.values(), rank, None, world) for clip in group]


def _check_inputs(clips: Sequence[Clip]) -> None:
    """Columns that are no input of a conditioner would be read by nobody."""
    usable = known_columns()
    for clip in clips:
        if unread := sorted(clip.item.inputs.keys() - usable.keys()):
            raise UnusedInputError(
                f"{clip.item.place or clip.item.media} gives {unread[0]!r}, which training does not read; "
                f"usable: {', '.join(sorted(usable))}."
            )


def _jobs(
    clips: Sequence[Clip], parts: PipelineComponents, config: CacheConfig, rank: int, bar: Any
) -> tuple[list[Job], list[Dropped]]:
    """What is wanted, and clips of which a file cannot be read."""
    folder = None if config.cache_dir is None else Path(config.cache_dir).expanduser()
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputPathError(f"cache_dir {folder} cannot be made: {error.strerror}.") from error
    there = cached_files(folder_of(clip.item.media, config.cache_dir) for clip in clips)
    places = ((folder_of(clip.item.media, config.cache_dir), clip.item.media.name) for clip in clips)
    # Before the files are read whole; what lies there may turn out to be another run's.
    _check_folders((place[0] for place in places if place not in there), config)
    hashes, maker = FileHashes(folder, rank), Maker.of(parts, config)
    media = dict.fromkeys(clip.item.media for clip in clips)
    bar.total = len(media)
    hashes.learn(media, config.workers, lambda _: bar.update())
    lookup = CacheLookup(clips, maker, hashes, config.cache_dir)
    jobs, dropped = [], []
    for clip in clips:
        try:
            meta = {**lookup.wanted(clip), "media": clip.item.media.name, "made_with": maker.about}
            kept = _kept(lookup, clip)
        except OSError as error:
            if config.strict:
                raise MediaReadError(f"{clip.item.media} cannot be read: {error}") from error
            logger.warning("%s is left out: %s", clip.item.media, error)
            dropped.append(Dropped(media=clip.item.media, reason=str(error), dataset=clip.dataset))
            continue
        path = kept or sample_path(clip.item.media, meta["key"], config.cache_dir)
        jobs.append(Job(clip=clip, meta=meta, path=path, is_made=kept is not None))
    hashes.save()
    return jobs, dropped


def _check_folders(folders: Iterable[Path], config: CacheConfig) -> None:
    """Say before the work that samples cannot be written."""
    for folder in dict.fromkeys(folders):
        if folder.is_dir() and (reason := why_not_writable(folder)):
            raise OutputPathError(
                f"Samples cannot be written beside the media in {folder} ({reason}): set cache.cache_dir to "
                "a folder for them."
                if config.cache_dir is None
                else f"cache.cache_dir is {folder}, which cannot be written ({reason}); give another folder."
            )


def _kept(lookup: CacheLookup, clip: Clip) -> Path | None:
    """The clip's sample that is there already, and whole."""
    try:
        return next((header.path for header in lookup.own(clip)), None)
    except DiffSynthError as error:
        logger.warning("%s has a sample that is made anew: %s", clip.item.media.name, error)
        return None


def _missing(jobs: Sequence[Job]) -> list[Job]:
    """Jobs without a whole file, each file once; equal captions stand together, so that none comes twice."""
    by_caption: dict[str, dict[Path, Job]] = {}
    for job in jobs:
        if not job.is_made:
            by_caption.setdefault(job.clip.item.caption, {})[job.path] = job
    return [job for group in by_caption.values() for job in group.values()]


def _check_room(jobs: Sequence[Job], parts: PipelineComponents, config: CacheConfig) -> None:
    """Stop before the work when not even the latents find room."""
    assert parts.vae is not None
    stride, channels = parts.spatial_stride, parts.vae.z_dim + sum(parts.facts.planes.values())
    size = torch.finfo(getattr(torch, config.dtype)).bits // 8
    needs: dict[Path, int] = {}
    for job in jobs:
        frames, height, width = job.clip.bucket
        positions = ((frames - 1) // 4 + 1) * (height // stride) * (width // stride)
        needs[job.path.parent] = needs.get(job.path.parent, 0) + size * channels * positions
    disks: dict[int, tuple[Path, int]] = {}
    for folder, need in needs.items():
        device = folder.stat().st_dev
        disks[device] = (folder, disks.get(device, (folder, 0))[1] + need)
    for folder, need in disks.values():
        if (free := shutil.disk_usage(folder).free) < need:
            raise OutputPathError(
                f"{len(jobs)} cached clips need {need / GB:.2f} GB and more, and {free / GB:.2f} GB are free "
                f"at {folder}. Free some space, or give cache_dir on another disk."
            )


def _stale(jobs: Sequence[Job], config: CacheConfig, lost: set[Path]) -> tuple[Path, ...]:
    """Samples of the same files that the plan does not want; removed where that is asked."""
    wanted = {job.path for job in jobs}
    files = {folder_of(job.clip.item.media, config.cache_dir) for job in jobs}
    content = {(job.path.parent, job.clip.item.media.name): job.meta["file"] for job in jobs}
    # Files that failed this time keep what they have.
    kept = {(folder_of(media, config.cache_dir), media.name) for media in lost}
    found: list[Path] = []
    for place, paths in cached_files(files).items():
        if place not in content or place in kept:
            continue
        for path in paths:
            # In a common folder another file of this name may own it.
            if path not in wanted and (config.cache_dir is None or _file_of(path) == content[place]):
                found.append(path)
    if found:
        names = ", ".join(path.name for path in found[:MAX_NAMED])
        more = " ..." if len(found) > MAX_NAMED else ""
        logger.info("%d older samples of these files are not of this plan: %s%s", len(found), names, more)
    if config.remove_stale:
        for path in found:
            with suppress(FileNotFoundError):
                path.unlink()
    return tuple(found)


def _file_of(path: Path) -> str | None:
    try:
        return EncodedSample.header(path).meta.get("file")
    except DiffSynthError:
        return None

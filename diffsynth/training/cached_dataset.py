"""Cached samples as training reads them: found, checked against each other and the DiT, loaded one by one.

Only headers are read here, and no encoder is needed: samples say who made them. A mixture is refused, with
the names of two files that do not belong together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch.utils.data import Dataset

from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError, MediaReadError
from diffsynth.training.batches import Pick
from diffsynth.training.cache_hashes import FileHashes
from diffsynth.training.cache_keys import SUFFIX, Maker, common_facts, differing, folder_of
from diffsynth.training.cache_lookup import CacheLookup
from diffsynth.training.dataset.clips import Clip, DatasetPlan, Dropped, Steps
from diffsynth.training.dataset.items import LIST_PREFIX
from diffsynth.training.dataset.planning import write_dropped
from diffsynth.training.samples import EncodedSample, SampleHeader
from diffsynth.training.v1_cache import V1_SUFFIX, header_v1, load_v1

logger = logging.getLogger("diffsynth")

HASH_WORKERS = 4
MAX_NAMED = 3
REMEDY = "make the cache anew (--task data_process)"
NOT_CACHED = f"{LIST_PREFIX}not_cached.txt"
V1_STRIDE = 8  # of its VAE, in height and width


@dataclass(frozen=True, kw_only=True)
class CachedClip:
    """One sample of a training run."""

    header: SampleHeader
    id: str  # unique within the run, the same in every run
    dataset: str = ""
    repeats: int = 1  # how often an epoch shows it
    weight: float = 1.0  # of its loss
    caption_dropout: float = 0.0  # share of steps without its caption
    batch_size: int = 0  # samples of one pass on one GPU; 0: the run's
    steps: Steps = (0, 0)  # of the run that see it; 0 as the second: to the end
    moments: bool = False  # each step sees one of its later latents alone


class CachedDataset(Dataset[EncodedSample]):
    """Samples by number. Made by `open_cache`."""

    def __init__(self, clips: Sequence[CachedClip]) -> None:
        self.clips = tuple(clips)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> EncodedSample:
        clip = self.clips[index]
        path = clip.header.path
        sample = load_v1(path) if is_v1(path) else EncodedSample.load(path)
        return replace(sample, meta={**sample.meta, "key": clip.id})

    def bucket(self, index: int) -> tuple[int, int, int, str]:
        """T, h, w and what else samples of one batch have in common."""
        frames, height, width, rest = self.clips[index].header.bucket
        return (1 if self.clips[index].moments else frames), height, width, rest

    def picked(self, pick: Pick) -> EncodedSample:
        """The sample as its step sees it: whole, or one latent of it."""
        sample = self[pick.index]
        return sample if pick.moment is None else sample.at_moment(pick.moment)

    def sample_id(self, index: int) -> str:
        """Stable and unique: what noise is drawn by."""
        return self.clips[index].id

    def source(self, index: int) -> str:
        """Hash of the media file that it was made of; of v1, its name."""
        header = self.clips[index].header
        return header.meta.get("file") or str(header.path)

    def name(self, index: int) -> str:
        """Of its file, for people."""
        return self.clips[index].header.path.name

    def media(self, index: int) -> str:
        """Name of the file that it was made of."""
        header = self.clips[index].header
        return header.meta.get("media") or header.path.name.removesuffix(V1_SUFFIX)

    def repeats(self, index: int) -> int:
        """How often an epoch shows the sample."""
        return self.clips[index].repeats

    def weight(self, index: int) -> float:
        """Of its loss."""
        return self.clips[index].weight

    def caption_dropout(self, index: int) -> float:
        """Share of steps at which it is shown without its caption."""
        return self.clips[index].caption_dropout

    def batch_size(self, index: int) -> int:
        """Samples of one pass on one GPU that its dataset asks for; 0: as many as the run's."""
        return self.clips[index].batch_size

    def steps(self, index: int) -> Steps:
        """The first step that sees the sample, and the first that does not any more; 0: to the end."""
        return self.clips[index].steps

    def is_moments(self, index: int) -> bool:
        """Whether each step sees one later latent of it alone."""
        return self.clips[index].moments

    def dataset(self, index: int) -> str:
        """Name of the dataset that it came from."""
        return self.clips[index].dataset


def open_cache(
    source: DatasetPlan | str | Path | Sequence[str | Path],
    facts: DiTFacts | None = None,
    *,
    maker: Maker | None = None,
    cache_dir: str | None = None,
    strict: bool = False,
    rank: int = 0,
    list_folder: Path | None = None,
) -> CachedDataset:
    """Find the cached samples of a dataset and check that they can be trained on together.

    Args:
        source: a plan; or cached files and folders of them, which are then taken as they are.
        facts: of the DiT; None leaves out the check against it.
        maker: how the run encodes, with a plan: only its samples count. None leaves it open, and there may be
            samples of one maker only.
        cache_dir: as in `CacheConfig`, with a plan.
        strict: a clip of the plan without a sample is an error; otherwise it is named and left out.
        rank: of this process; the first one writes the list.
        list_folder: where the clips without a sample are listed.

    Raises:
        ArgumentError: when there is no sample, samples do not belong together or do not fit the DiT, or
            caption dropout is asked of samples of v1.
        CheckpointError: for a damaged sample.
    """
    if isinstance(source, DatasetPlan):
        hashes = FileHashes(None if cache_dir is None else Path(cache_dir).expanduser(), rank)
        hashes.learn(dict.fromkeys(clip.item.media for clip in source.clips), HASH_WORKERS, lambda _: None)
        lookup = CacheLookup(source.clips, maker or Maker(), hashes, cache_dir)
        found, missing = _of_plan(source, facts, lookup, cache_dir)
        hashes.save()
        listed = list_folder if rank == 0 else None
        _tell_missing(missing, len(source.clips), strict, listed)
    else:
        found = [CachedClip(header=h, id=h.id) for h in _of_paths(source)]
    if not found:
        raise ArgumentError(f"No cached sample was found; {REMEDY.replace('anew', 'first')}.")
    _check_agreement([clip.header for clip in found])
    for clip in found:
        if facts is not None and (fault := _misfit(clip.header, facts)):
            raise ArgumentError(
                f"{clip.header.path} does not fit the DiT: {fault}. Load the DiT that it was made for, or "
                f"{REMEDY}."
            )
        if clip.moments and not clip.header.is_plain:
            raise ArgumentError(
                f"{clip.header.path} holds more than a caption beside its {clip.header.latent_shape[2]} "
                "latents, and moments takes one of them away from the rest; leave moments out."
            )
        if clip.caption_dropout and is_v1(clip.header.path):
            raise ArgumentError(
                f"caption_dropout is {clip.caption_dropout}, and {clip.header.path} was cached by DiffSynth "
                f"v1, without the empty caption: set caption_dropout to 0, or {REMEDY}."
            )
    return CachedDataset(_with_unique_ids(found))


def is_v1(path: Path) -> bool:
    """Whether the name is one of v1's cache."""
    return path.name.endswith(V1_SUFFIX)


def _read_header(path: Path) -> SampleHeader:
    return header_v1(path) if is_v1(path) else EncodedSample.header(path)


def _of_paths(source: str | Path | Sequence[str | Path]) -> list[SampleHeader]:
    """Headers of files, and of all cached files below folders, by name."""
    headers = []
    for given in [source] if isinstance(source, str | Path) else source:
        path = Path(given).expanduser()
        if not path.exists():
            raise ArgumentError(f"{path} does not exist; give cached samples, or a folder of them.")
        files = [path] if path.is_file() else [*path.rglob(f"*{SUFFIX}"), *path.rglob(f"*{V1_SUFFIX}")]
        headers += [_read_header(file) for file in sorted(files) if not file.name.startswith(".part-")]
    seen: dict[tuple[str, ...], SampleHeader] = {}
    for header in headers:
        if "file" not in header.meta:
            continue
        place = tuple(header.meta.get(name, "") for name in ("file", "inputs", "transform"))
        other = seen.setdefault(place, header)
        if other.id != header.id and common_facts(other.meta) == common_facts(header.meta):
            raise ArgumentError(
                f"{other.path} and {header.path} are one clip with two captions. Give the dataset, which "
                "says the caption that holds, or remove the older one (data_process with remove_stale=True)."
            )
    return headers


def _of_plan(
    plan: DatasetPlan, facts: DiTFacts | None, lookup: CacheLookup, cache_dir: str | None
) -> tuple[list[CachedClip], list[Clip]]:
    """The run's own sample of each clip; and the clips that have none, of anybody."""
    found: list[CachedClip] = []
    missing: list[Clip] = []
    foreign: list[tuple[Clip, SampleHeader]] = []  # samples of other makers, where the run's is not there
    for clip in plan.clips:
        try:
            own, others = _only(lookup.own(clip), facts), []
            if own is None:
                others = lookup.of_others(clip)
        except OSError:
            missing.append(clip)
            continue
        own = own or (None if others else _of_v1(clip, cache_dir))
        if own is not None:
            found.append(
                CachedClip(
                    header=own, id=own.id, dataset=clip.dataset, repeats=clip.repeats, weight=clip.weight,
                    caption_dropout=clip.caption_dropout, batch_size=clip.batch_size, steps=clip.steps,
                    moments=clip.moments,
                )
            )  # fmt: skip
        elif others:
            foreign.append((clip, min(others, key=lambda one: len(differing(lookup.wanted(clip), one.meta)))))
        else:
            missing.append(clip)
    if foreign:
        raise _of_another_maker(foreign, lookup, len(plan.clips))
    return found, missing


def _only(own: Sequence[SampleHeader], facts: DiTFacts | None) -> SampleHeader | None:
    """One sample of a clip; refuses to choose between makers, except for what the DiT cannot read."""
    # Samples for another kind of DiT may lie beside these; they only count where nothing fits.
    fits = [header for header in own if facts is None or not _misfit(header, facts)] or list(own)
    for header in fits[1:]:
        raise ArgumentError(
            f"{fits[0].path} and {header.path} are samples of one clip by two makers "
            f"({differing(fits[0].meta, header.meta)}), and this run does not tell which of them it means: "
            "name model.vae, model.text_encoder and model.image_encoder as when they were encoded, or "
            f"{REMEDY} with cache.remove_stale, which removes the other."
        )
    return fits[0] if fits else None


def _of_another_maker(
    foreign: Sequence[tuple[Clip, SampleHeader]], lookup: CacheLookup, num_clips: int
) -> ArgumentError:
    clip, header = foreign[0]
    wanted = lookup.wanted(clip)
    known = {name: value for name, value in header.meta.items() if name in wanted}
    theirs = f", by {header.meta['made_with']}" if header.meta.get("made_with") else ""
    ours = f", by {lookup.maker.about}" if lookup.maker.about else ""
    return ArgumentError(
        f"{len(foreign)} of {num_clips} clips have no sample of this run{ours}, but one of another maker, as "
        f"{header.path}{theirs}. What differs, this run's first: {differing(wanted, known)}. Give the "
        f"settings that these were made with, or {REMEDY}; where that leaves a clip out, remove its other "
        "samples."
    )


def _of_v1(clip: Clip, cache_dir: str | None) -> SampleHeader | None:
    """The sample of DiffSynth v1, which says nothing of its maker: read where it is all there is."""
    path = folder_of(clip.item.media, cache_dir) / f"{clip.item.media.name}{V1_SUFFIX}"
    if not path.is_file():
        return None
    header = header_v1(path)
    frames, height, width = clip.bucket
    wanted = ((frames - 1) // 4 + 1, height // V1_STRIDE, width // V1_STRIDE)
    return header if header.latent_shape[2:] == wanted else None


def _tell_missing(missing: Sequence[Clip], num_clips: int, strict: bool, folder: Path | None) -> None:
    reason = "no cached sample of this caption, size and file"
    dropped = [Dropped(media=clip.item.media, reason=reason, dataset=clip.dataset) for clip in missing]
    listed = None if folder is None else write_dropped(dropped, folder, NOT_CACHED)
    if not missing:
        return
    names = ", ".join(clip.item.media.name for clip in missing[:MAX_NAMED])
    text = (
        f"{len(missing)} of {num_clips} clips have {reason}: {names}"
        f"{' ...' if len(missing) > MAX_NAMED else ''}{f' (all: {listed})' if listed else ''}. Run --task "
        "data_process, which says why a clip is left out."
    )
    if strict:
        raise MediaReadError(text)
    logger.warning("%s They are not trained on.", text)


def _check_agreement(headers: Sequence[SampleHeader]) -> None:
    first = headers[0]
    for header in headers[1:]:
        if common_facts(header.meta) != common_facts(first.meta) or _channels(header) != _channels(first):
            raise _mixture(first, header)


def _mixture(first: SampleHeader, second: SampleHeader) -> ArgumentError:
    differ = differing(first.meta, second.meta) or f"{_channels(first)} and {_channels(second)}"
    return ArgumentError(
        f"{first.path} and {second.path} were not made alike ({differ}) and cannot be trained on together; "
        f"{REMEDY}, or give samples of one kind only."
    )


def _channels(header: SampleHeader) -> dict[str, object]:
    """Channels of the latent, width of the text, channels of planes, shape of image tokens."""
    shapes = header.shapes
    planes = {
        name.removeprefix("positive.planes."): shape[1]
        for name, shape in shapes.items()
        if name.startswith("positive.planes.")
    }
    image = shapes.get("positive.image")
    return {
        "latent channels": header.latent_shape[1],
        "text width": shapes["positive.text"][-1] if "positive.text" in shapes else None,
        "planes": planes,
        "image tokens": None if image is None else tuple(image[1:]),
    }


def _misfit(header: SampleHeader, facts: DiTFacts) -> str:
    """In words, why the DiT cannot be trained on a sample; "" where it can."""
    has = _channels(header)
    for name, expected in (("latent channels", facts.latent_channels), ("text width", facts.text_dim)):
        if has[name] != expected:
            return f"{name} are {has[name]}, the DiT reads {expected}"
    rows, columns = header.latent_shape[3:]
    if rows % facts.patch[0] or columns % facts.patch[1]:
        return f"the latent is {rows} x {columns}, the DiT reads multiples of {facts.patch}"
    return _misfit_of_planes(has, facts) or _misfit_of_image(has, facts) or _misfit_of_adapters(header, facts)


def _misfit_of_planes(has: Mapping[str, object], facts: DiTFacts) -> str:
    planes, wanted = has["planes"], dict(facts.planes)
    assert isinstance(planes, dict)
    shown = ", ".join(f"{name} ({count})" for name, count in planes.items()) or "none"
    expected = ", ".join(f"{name} ({count})" for name, count in wanted.items()) or "none"
    # Of a DiT that follows a control video the others may be empty: they are zeros then.
    needed = {"control"} if "control" in wanted else set(wanted)
    if not needed <= planes.keys() or any(wanted.get(name) != count for name, count in planes.items()):
        return f"its planes are {shown}, the DiT reads {expected}"
    return ""


def _misfit_of_image(has: Mapping[str, object], facts: DiTFacts) -> str:
    tokens = has["image tokens"]
    if (tokens is None) != (facts.image_dim is None):
        return "it holds features of an image encoder, the DiT reads none" if tokens else (
            "it holds no features of an image encoder, which the DiT reads"
        )  # fmt: skip
    if isinstance(tokens, tuple) and tokens[1] != facts.image_dim:
        return f"its image features are {tokens[1]} wide, the DiT reads {facts.image_dim}"
    return ""


def _misfit_of_adapters(header: SampleHeader, facts: DiTFacts) -> str:
    positive = header.structure.get("positive")
    inner = positive.get("fields", {}) if isinstance(positive, dict) else {}
    unread = sorted(set(inner.get("adapters", {}).get("map", {})) - facts.adapters)
    return f"it holds inputs of {', '.join(unread)}, which is not loaded beside the DiT" if unread else ""


def _with_unique_ids(clips: Sequence[CachedClip]) -> list[CachedClip]:
    """The second and later of equal samples (a file in two datasets) get a name of their own."""
    seen: Counter[str] = Counter()
    unique = []
    for clip in clips:
        seen[clip.id] += 1
        unique.append(clip if seen[clip.id] == 1 else replace(clip, id=f"{clip.id}-{seen[clip.id]}"))
    return unique

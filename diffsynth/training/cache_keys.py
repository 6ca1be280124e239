"""What a cached sample is made of, as texts; their hash is its key.

A key changes with anything that changes the numbers: content of the media and of the files of its inputs,
caption, transform, encoders, and `VERSION`. All of it stands in the sample's metadata in plain words, so that
training, which sees no encoder, can tell whether samples belong together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.conditioning.text import clean_prompt
from diffsynth.conditioning.text_cache import fingerprint
from diffsynth.training.cache_hashes import FileHashes, short_hash

if TYPE_CHECKING:
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.training.cache_config import CacheConfig
    from diffsynth.training.dataset.clips import Clip

VERSION = "1"  # raised by hand, and only when the same clip and encoders give other numbers
SUFFIX = ".tensors.safetensors"
KEYED = re.compile(rf"(?P<media>.+)\.(?P<key>[0-9a-f]{{16}}){re.escape(SUFFIX)}")
# Facts of a sample that all samples of one training have in common.
COMMON = ("preprocessing", "vae", "text_encoder", "image_encoder", "conditions", "tiles", "dtype")
# Facts of the clip alone, which training knows as well.
OF_CLIP = ("file", "inputs", "caption", "transform")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """Who encoded: a hash of names, shapes, dtypes and sampled bytes of each network's weights."""

    vae: str
    text_encoder: str
    image_encoder: str  # "" where the DiT reads no image tokens
    conditions: str  # which planes and image tokens the DiT reads, JSON

    @classmethod
    def of(cls, parts: PipelineComponents) -> Encoders:
        """Those of a pipeline."""
        told = {
            "planes": dict(parts.planes),
            "image_tokens": parts.image_dim,
            "two_images": parts.has_image_positions,
            "holds_first_frame": parts.holds_first_frame,
        }
        return cls(
            vae=_identity(parts.vae),
            text_encoder=_identity(parts.text_encoder),
            image_encoder=_identity(parts.image_encoder) if parts.has_image_branch else "",
            conditions=json.dumps(told, sort_keys=True),
        )


def facts_of_clip(clip: Clip, hashes: FileHashes) -> dict[str, str]:
    """What decides a sample besides encoders: the values of `OF_CLIP`.

    Raises:
        OSError: when a file of the clip cannot be read.
    """
    inputs = {name: _told(value, hashes) for name, value in sorted(clip.item.inputs.items())}
    return {
        "file": hashes.digest(clip.item.media),
        "inputs": json.dumps(inputs, ensure_ascii=False),
        "caption": clip.item.caption,
        "transform": json.dumps(clip.transform(), sort_keys=True),
    }


def facts_of_sample(
    clip: Clip, hashes: FileHashes, encoders: Encoders, parts: PipelineComponents, config: CacheConfig
) -> dict[str, str]:
    """Everything that decides a sample, and its key; goes into the file's metadata."""
    caption = clip.item.caption
    ids = [] if parts.tokenizer is None else parts.tokenizer.encode(clean_prompt(caption))
    facts = {
        **facts_of_clip(clip, hashes),
        "preprocessing": VERSION,
        "vae": encoders.vae,
        "text_encoder": encoders.text_encoder,
        "image_encoder": encoders.image_encoder,
        "conditions": encoders.conditions,
        "tiles": json.dumps([config.tile_size, config.tile_stride]) if config.tiled else "",
        "dtype": config.dtype,
        "tokens": short_hash([str(ids)]),
    }
    key = short_hash([f"{name}={value}" for name, value in sorted(facts.items())])
    return {**facts, "media": clip.item.media.name, "key": key}


def sample_path(media: Path, key: str, cache_dir: str | None) -> Path:
    """``clip.mp4.<key>.tensors.safetensors``."""
    return folder_of(media, cache_dir) / f"{media.name}.{key}{SUFFIX}"


def folder_of(media: Path, cache_dir: str | None) -> Path:
    """Where samples of a media file lie."""
    return media.parent if cache_dir is None else Path(cache_dir).expanduser()


def cached_files(folders: Iterable[Path]) -> dict[tuple[Path, str], list[Path]]:
    """Samples that lie in folders, by folder and name of their media; each folder is listed once."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            continue
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if match := KEYED.fullmatch(entry.name):
                found.setdefault((folder, match["media"]), []).append(folder / entry.name)
    return found


def common_facts(meta: Mapping[str, str]) -> tuple[str, ...]:
    """What must be the same for all samples of one training."""
    return tuple(meta.get(name, "") for name in COMMON)


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """In words, in which common facts two samples differ."""
    differ = [name for name in COMMON if first.get(name, "") != second.get(name, "")]
    return "; ".join(
        f"{name}: {first.get(name) or 'none'} and {second.get(name) or 'none'}" for name in differ
    )


def _identity(network: object | None) -> str:
    return "" if network is None else fingerprint(network).hex()[:16]


def _told(value: object, hashes: FileHashes) -> object:
    if isinstance(value, Path):
        return f"file {_tree_hash(value, hashes)}"
    if isinstance(value, tuple | list):
        return [_told(item, hashes) for item in value]
    return value


def _tree_hash(path: Path, hashes: FileHashes) -> str:
    """Of a file, or of a folder of frames."""
    if not path.is_dir():
        return hashes.digest(path)
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return short_hash([text for file in files for text in (file.name, hashes.digest(file))], 16)

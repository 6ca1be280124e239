"""What a cached sample is made of, as texts; their hash is its key.

A key changes with anything that changes the numbers: content of the media and of the files of its inputs,
caption, transform, encoders, and `VERSION`. All of it stands in the sample's metadata in plain words, so that
training, which sees no encoder, can tell whether samples belong together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.text import clean_prompt
from diffsynth.conditioning.text_cache import fingerprint
from diffsynth.training.cache_hashes import FileHashes, short_hash

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.conditioning.tokenizer import Tokenizer
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.training.cache_config import CacheConfig
    from diffsynth.training.dataset.clips import Clip

VERSION = "1"  # raised by hand, and only when the same clip and encoders give other numbers
SUFFIX = ".tensors.safetensors"
KEYED = re.compile(rf"(?P<media>.+)\.(?P<key>[0-9a-f]{{16}}){re.escape(SUFFIX)}")
# Facts of a sample that all samples of one training have in common.
COMMON = ("preprocessing", "vae", "text_encoder", "image_encoder", "conditions", "tiles", "dtype")
# What decides each of them, in the user's words.
SETTINGS = {
    "preprocessing": "the version that encoded",
    "vae": "model.vae, model.dtype",
    "text_encoder": "model.text_encoder, model.dtype",
    "image_encoder": "model.image_encoder, model.dtype",
    "conditions": "what model.dit reads",
    "tiles": "cache.tiled, tile_size, tile_stride",
    "dtype": "cache.dtype",
    "tokens": "model.tokenizer",
}
# Facts of the clip alone, which training knows as well.
OF_CLIP = ("file", "inputs", "caption", "transform")


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """What all samples of a run have in common, as far as the run can tell: see `Maker.facts_of`."""

    facts: Mapping[str, str] = field(default_factory=dict)  # those of `COMMON` that are known
    tokenizer: Tokenizer | None = None  # None: not known
    about: str = ""  # the encoders' files and their dtype, for people

    @classmethod
    def of(cls, parts: PipelineComponents, config: CacheConfig) -> Maker:
        """The one that has encoders loaded: nothing is left open."""
        encoders = {
            "vae": encoder_identity(parts.vae),
            "text_encoder": encoder_identity(parts.text_encoder),
            "image_encoder": encoder_identity(parts.image_encoder) if parts.facts.has_image_branch else "",
        }
        return cls(
            facts={**encoders, **facts_of_settings(parts.facts, config)}, tokenizer=parts.tokenizer,
            about=told_encoders(parts),
        )  # fmt: skip

    def facts_of(self, clip: Clip, hashes: FileHashes) -> dict[str, str]:
        """Everything that decides a sample, as far as it is known; where all is known, the key as well.

        Raises:
            OSError: when a file of the clip cannot be read.
        """
        facts = {**facts_of_clip(clip, hashes), **self.facts}
        if self.tokenizer is None:
            return facts
        facts["tokens"] = short_hash([str(self.tokenizer.encode(clean_prompt(clip.item.caption)))])
        if set(COMMON) <= facts.keys():
            facts["key"] = short_hash([f"{name}={value}" for name, value in sorted(facts.items())])
        return facts


def told_encoders(parts: PipelineComponents) -> str:
    """Files and dtype of the encoders, for people."""
    names = ("vae", "text_encoder", "image_encoder")
    files = [Path(parts.sources[name]).name for name in names if name in parts.sources]
    return f"{', '.join(files)} in {str(parts.dtype).removeprefix('torch.')}" if files else ""


def facts_of_settings(dit: DiTFacts, config: CacheConfig) -> dict[str, str]:
    """Those of `COMMON` that follow from settings and the DiT, whoever encodes."""
    told = {
        "planes": dict(dit.planes),
        "image_tokens": dit.image_dim,
        "two_images": dit.has_image_positions,
        "holds_first_frame": dit.holds_first_frame,
    }
    return {
        "preprocessing": VERSION,
        "conditions": json.dumps(told, sort_keys=True),
        "tiles": json.dumps([config.tile_size, config.tile_stride]) if config.tiled else "",
        "dtype": config.dtype,
    }


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
    """In words, in which common facts two samples differ, and the settings that decide them."""
    differ = [name for name in (*COMMON, "tokens") if first.get(name, "") != second.get(name, "")]
    return "; ".join(
        f"{name}: {first.get(name) or 'none'} and {second.get(name) or 'none'} ({SETTINGS[name]})"
        for name in differ
    )


def agree(meta: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a sample is what is wanted, as far as that is known."""
    return all(
        _read_conditions(meta.get(name, "")) == _read_conditions(value)
        if name == "conditions"
        else meta.get(name) == value
        for name, value in wanted.items()
        if name != "key"
    )


def _read_conditions(told: str) -> object:
    """Without what the number of latent channels tells: clips may be encoded with no DiT to ask for it."""
    try:
        found = json.loads(told)
    except ValueError:
        return told
    return {k: v for k, v in found.items() if k != "holds_first_frame"} if isinstance(found, dict) else told


def encoder_identity(network: object | None, read: Callable[[str], Tensor] | None = None) -> str:
    """Who encoded: a hash of names, shapes, dtypes and sampled bytes of the weights; "" for nobody.

    Args:
        network: an encoder.
        read: gives its weights by name, where the network is an outline without them.
    """
    return "" if network is None else fingerprint(network, read).hex()[:16]


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

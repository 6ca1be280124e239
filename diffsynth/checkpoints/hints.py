"""What lies beside the shapes: the file's own metadata, JSON files next to it, and its path.

Some numbers of a network are in no tensor's shape (heads, text length, positions of injected blocks). They
are taken from the first source that tells them, in this order: metadata key ``config`` of the file;
``NAME.json`` or ``NAME.config.json`` beside it; ``config.json`` of its folder. A source counts only if every
size it names agrees with the tensors: official repositories ship files that describe another network, or are
wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, cast

from diffsynth.errors import ConfigurationError

MAX_JSON_BYTES = 4 << 20
TRANSFORMER_FOLDERS = ("transformer", "transformer_2")  # of diffusers' repositories
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>\..+)")
Shapes = Mapping[str, tuple[int, ...]]
Role = Literal["high", "low"]

# Parts of a document that describes several networks: {"dit": {...}, "vae": {...}}.
COMPONENTS = {
    "dit": ("dit", "wan_video_dit", "transformer", "transformer_2", "unet"),
    "vae": ("vae", "wan_video_vae"),
    "text_encoder": ("text_encoder", "wan_video_text_encoder", "t5", "umt5"),
    "image_encoder": ("image_encoder", "wan_video_image_encoder", "clip"),
    "audio_encoder": ("audio_encoder", "wan_video_audio_encoder", "wav2vec2"),
}
# Keys that only the named network's configuration has: a document with them describes no other network.
OWN_KEYS = {
    "dit": {
        "in_dim",
        "freq_dim",
        "text_dim",
        "text_len",
        "cross_attn_norm",
        "vace_layers",
        "attention_head_dim",
    },
    "vae": {"z_dim", "base_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "temporal_downsample"},
    "text_encoder": {"d_model", "d_ff", "d_kv", "vocab_size", "dim_attn", "dim_ffn", "num_buckets"},
    "image_encoder": {"image_size", "projection_dim", "vision_config"},
    "audio_encoder": {"vocab_size", "conv_dim", "conv_kernel", "num_feat_extract_layers"},
}
# "high_noise", "HIGH", "HighNoise" in a name; not "high_res" or "low_vram", which tell of something else.
_OTHER = r"res|resolution|quality|vram|light|poly|key|contrast|detail|fps|motion|speed|rank|angle"
ROLE_MARK = re.compile(
    rf"(?<![a-z])(?P<role>high|low)(?:(?P<noise>[_-]?noise)|(?![_-]?(?:{_OTHER})(?![a-z])))(?![a-z])",
    re.IGNORECASE,
)

# Words of published step-distilled models: LightX2V, Wan2.2-Lightning, CausVid, Self-Forcing, AccVideo,
# FusionX, Phr00t's Rapid, Turbo and FastWan, DMD, LCM; "4step", "8-steps".
DISTILLED = re.compile(
    r"distil|lightning|lightx2v|turbo|causvid|self[-_ ]?forcing|accvid|fusionx|rapid|fast[-_ ]?wan"
    r"|few[-_ ]?step|(?<![a-z])(?:dmd|lcm)|(?<!\d)[1-8][-_ ]?steps?(?![a-z=\d])",
    re.IGNORECASE,
)


# Widths of released DiTs that are never one expert of a pair: 1.3B, 5B. Of 14B only those with an image
# encoder are not: a T2V-14B and an expert of T2V-A14B have the same tensors.
SINGLE_DIMS = (1536, 3072)
DIM_14B = 5120


def is_of_no_pair(sizes: Mapping[str, object]) -> bool:
    """Whether no released pair of experts has these sizes of a DiT."""
    dim = sizes.get("dim")
    return dim in SINGLE_DIMS or (dim == DIM_14B and sizes.get("image_dim") is not None)


@dataclass(frozen=True, slots=True)
class Document:
    """One JSON object found beside the shapes."""

    source: str  # for messages: "metadata", "config.json"
    content: Mapping[str, object]
    is_readable: bool = True
    note: str = ""  # what it changes, for the log


@dataclass
class Hints:
    """The documents of one checkpoint, and a notebook of what was assumed while sizes were read."""

    documents: tuple[Document, ...] = ()
    place: str = "the file"  # the checkpoint, for messages
    assumed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # keys that neither a shape, a source nor a rule tells
    generation: dict[str, object] = field(default_factory=dict)

    def fresh(self) -> Hints:
        """Return the same documents with an empty notebook."""
        return Hints(self.documents, self.place)

    def assume(self, sentence: str) -> None:
        """Note what was taken for granted."""
        self.assumed.append(sentence)

    def lack(self, key: str, why: str, example: str) -> None:
        """Note a key that nothing tells, and how to give it."""
        self.missing.append(
            f"{key} is missing: {why}. Give it in a config.json in the file's folder, or in the metadata key "
            f'"config" of the file: {{"{key}": {example}}}.'
        )

    def told(
        self, component: str, sizes: Mapping[str, object], spellings: Mapping[str, str] | None = None
    ) -> dict[str, object]:
        """Return what agreeing documents say, under our names.

        Args:
            component: "dit", "vae", "text_encoder", "image_encoder" or "audio_encoder".
            sizes: what the shapes tell, under our names; a document that names another value is left aside.
            spellings: other names of keys -> ours.
        """
        spellings = spellings or {}
        answer: dict[str, object] = {}
        for document in self.documents:
            if not document.is_readable:
                self.assume(f"{document.source} was left aside: it is no JSON object.")
            is_news = self._note_generation(document.content)
            if document.note and (is_news or not document.content):
                self.assume(document.note)
            for part in _parts(document.content, component):
                said = {
                    spellings.get(key, key): _plain(value) for key, value in part.items() if value is not None
                }
                heads, head_dim = said.get("num_heads"), said.get("attention_head_dim")
                if isinstance(heads, int) and isinstance(head_dim, int):
                    said.setdefault("dim", heads * head_dim)
                wrong = [key for key, value in said.items() if key in sizes and sizes[key] != value]
                if wrong:
                    self.assume(
                        f"{document.source} was left aside: it says {wrong[0]} is {said[wrong[0]]}, the "
                        f"tensors say {sizes[wrong[0]]}."
                    )
                    continue
                self._note_generation(part)
                answer = {**said, **answer}
        return answer

    def _note_generation(self, content: Mapping[str, object]) -> bool:
        """Take up defaults that nothing more specific has told; whether there were such."""
        defaults = content.get("generation")
        if isinstance(defaults, str):
            defaults = _parse(defaults)
        if not isinstance(defaults, Mapping):
            return False
        is_news = not set(defaults) <= set(self.generation)
        self.generation = {**defaults, **self.generation}
        return is_news


def _plain(value: object) -> object:
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value


def _parts(content: Mapping[str, object], component: str) -> Iterator[Mapping[str, object]]:
    names = {name for spellings in COMPONENTS.values() for name in spellings}
    nested = {key: value for key, value in content.items() if key in names and isinstance(value, Mapping)}
    if nested:
        yield from (value for key, value in nested.items() if key in COMPONENTS[component])
        return
    foreign: set[str] = set().union(*(keys for name, keys in OWN_KEYS.items() if name != component))
    if not (foreign - OWN_KEYS[component]) & set(content):
        yield content


def _parse(text: str) -> Mapping[str, object] | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_documents(paths: tuple[Path, ...], metadata: Mapping[str, str]) -> tuple[Document, ...]:
    """Return the JSON objects that may describe a checkpoint, the most specific first."""
    documents = []
    own = _parse(metadata["config"]) if "config" in metadata else None
    if "config" in metadata or "generation" in metadata:
        extra = {"generation": metadata["generation"]} if "generation" in metadata else {}
        is_readable = "config" not in metadata or own is not None
        documents.append(Document('the metadata key "config"', {**extra, **(own or {})}, is_readable))
    if paths:
        shard = SHARD.fullmatch(paths[0].name)
        stem = shard["stem"] if shard else paths[0].stem
        for name in (f"{stem}.json", f"{stem}.config.json", "config.json"):
            file = paths[0].parent / name
            if file.is_file() and file.stat().st_size <= MAX_JSON_BYTES:
                content = _parse(file.read_text("utf-8", errors="replace"))
                documents.append(Document(name, content or {}, content is not None))
    boundary = _pipeline_index(paths).get("boundary_ratio")
    if isinstance(boundary, float):
        documents.append(Document("model_index.json", {"generation": {"boundary": boundary}}))
    documents += _scheduler(paths)
    return tuple(documents)


def _scheduler(paths: tuple[Path, ...]) -> list[Document]:
    """What a diffusers repository says of noise levels, for the transformer that lies in it.

    ``flow_shift`` of UniPC and DPM++, ``shift`` of Euler: one number of the same meaning. With dynamic
    shifting it follows the size of each video, and diffusers does not read the number beside it either.
    """
    if not paths or paths[0].parent.name not in TRANSFORMER_FOLDERS:
        return []
    file = paths[0].parent.parent / "scheduler" / "scheduler_config.json"
    if not file.is_file() or file.stat().st_size > MAX_JSON_BYTES:
        return []
    name, content = f"scheduler/{file.name}", _parse(file.read_text("utf-8", errors="replace"))
    if content is None:
        return [Document(name, {}, is_readable=False)]
    key = "flow_shift" if content.get("flow_shift") is not None else "shift"
    shift = content.get(key)
    if shift is None or content.get("use_dynamic_shifting"):
        return []
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
        note = f"{key} of {name} was left aside: it is {shift!r}, and a shift is a number above 0."
        return [Document(name, {}, note=note)]
    note = f"sigma_shift is {shift:g} where a call gives none: {key} of {name}."
    return [Document(name, {"generation": {"sigma_shift": float(shift)}}, note=note)]


def tells_few_steps(paths: tuple[Path, ...], metadata: Mapping[str, str]) -> bool:
    """Whether a checkpoint's path or metadata says that it was distilled to a few steps."""
    texts = ["/".join(path.parts[-3:]) for path in paths] + list(metadata.values())
    return any(DISTILLED.search(text) for text in texts)


def role_of(paths: tuple[Path, ...], metadata: Mapping[str, str], *, surely: bool = False) -> Role | None:
    """Return which expert of a pair this is: "high" for the noisy part of the way.

    Args:
        paths: of the files; the name of the first or of its folder may tell it.
        metadata: of the file; "expert", which this package writes, comes before what a path says.
        surely: of a path "high_noise" alone counts, and not "high", which may mean anything else.
    """
    told = metadata.get("expert")
    if told in ("high", "low"):
        return cast("Role", told)
    texts = [text for path in paths[:1] for text in (path.name, path.parent.name)]
    for text in (*texts, metadata.get("model_type", "")):
        if (mark := role_mark(text)) is not None and (mark["noise"] or not surely):
            return "high" if mark["role"].lower() == "high" else "low"
    folder = paths[0].parent if paths else Path()
    if folder.name not in TRANSFORMER_FOLDERS:
        return None
    # The index names what belongs to the model; [null, null] there says that it has one DiT.
    second = _pipeline_index(paths).get("transformer_2")
    has_two = any(second) if isinstance(second, list) else (folder.parent / "transformer_2").is_dir()
    if not has_two:
        return None
    return "low" if folder.name == "transformer_2" else "high"


def role_mark(text: str) -> re.Match[str] | None:
    """Return where a name tells the expert, group "role"; None where it does not, or names both."""
    marks = list(ROLE_MARK.finditer(text))
    return marks[-1] if len({mark["role"].lower() for mark in marks}) == 1 else None


def _pipeline_index(paths: tuple[Path, ...]) -> Mapping[str, object]:
    """Diffusers' model_index.json of the repository whose transformer this is; empty without one."""
    if not paths or paths[0].parent.name not in TRANSFORMER_FOLDERS:
        return {}
    index = paths[0].parent.parent / "model_index.json"
    if not index.is_file() or index.stat().st_size > MAX_JSON_BYTES:
        return {}
    return _parse(index.read_text("utf-8", errors="replace")) or {}


def size_of(shapes: Shapes, name: str, axis: int) -> int:
    """Return one axis of a tensor; a mark of the row guarantees that the tensor is there."""
    shape = shapes.get(name)
    if shape is None or axis >= len(shape) or prod(shape) == 0:
        raise ConfigurationError(
            f"{name} has shape {shape}; it should have {axis + 1} or more axes, none of them empty. The file "
            "is not of the kind that its names say."
        )
    return shape[axis]


def count_of(shapes: Shapes, prefix: str) -> int:
    """Return 1 + the largest N among names ``<prefix>N.``; 0 if there is none.

    Raises:
        ConfigurationError: when N is larger than any list with so few tensors could have.
    """
    cut = len(prefix)
    names = [name[cut:] for name in shapes if name.startswith(prefix)]
    numbers = {name.split(".", 1)[0] for name in names}
    count = max((int(n) + 1 for n in numbers if n.isdecimal() and len(n) < 7), default=0)
    if count > max(len(names), 1):
        raise ConfigurationError(
            f"The file has a tensor {prefix}{count - 1}, but only {len(names)} tensors {prefix}*; it is "
            "incomplete or made up."
        )
    return count

"""Which networks stand in a checkpoint, told by names and shapes; no table of hashes, no weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from diffsynth.checkpoints.architecture import Architecture, Match
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.hints import Hints, is_of_no_pair, read_documents, role_of
from diffsynth.checkpoints.layouts import LAYOUTS
from diffsynth.errors import ConfigurationError, LoRAFileError, UnknownCheckpointError

# What trainers and ComfyUI put in front of names; any of them, in any order.
PREFIX = re.compile(
    r"(?:(?:model\.diffusion_model|diffusion_model|transformer|model|module|net|pipe\.dit|dit|pipe\.vae|vae"
    r"|first_stage_model|text_encoders(?:\.umt5xxl(?:\.transformer)?)?|generator(?:_ema)?|ema|state_dict|model_state|_orig_mod"
    r"|_fsdp_wrapped_module)\.)+"
)
IGNORED = re.compile(r"model_type\..+")  # a marker without information in some ComfyUI files
ATTACHMENTS = ("spiece_model", "tokenizer_json")  # ComfyUI keeps the tokenizer in the text encoder's file
LORA = re.compile(
    r".*(?:[._]lora_(?:A|B|up|down|alpha)\b.*|\.lora_[AB]$|\.(?:hada_w|lokr_w)\d.*|\.diff(?:_b)?$)|lora_unet_.*"
)


def detect(checkpoint: Checkpoint, rows: Sequence[Architecture]) -> list[Match]:
    """Return every network of ``rows`` that stands in ``checkpoint``, the DiT before its adapters.

    Raises:
        UnknownCheckpointError: when no row matches; says which is nearest and what it lacks.
        LoRAFileError: when it is a LoRA, which is no model.
        ConfigurationError: when names say one thing and shapes another.
    """
    documents = read_documents(checkpoint.paths, checkpoint.metadata)
    matches: list[Match] = []
    groups = _by_prefix(checkpoint)
    try:
        for prefix, group in groups:
            official, layout = _to_official(group)
            hints = Hints(documents, checkpoint.source)
            matches += _matches_in(official, _layout_name(prefix, layout), prefix, rows, hints)
    except ConfigurationError as error:
        raise ConfigurationError(f"{checkpoint.source}: {error}") from None
    if matches:
        return [_with_tokenizer(match, groups) for match in matches]
    if any(LORA.fullmatch(name) for name in checkpoint.shapes):
        raise LoRAFileError(checkpoint.source, len(checkpoint))
    raise _unknown(checkpoint, [_to_official(group)[0] for _, group in groups], rows)


def _with_tokenizer(match: Match, groups: Sequence[tuple[str, Checkpoint]]) -> Match:
    """A text encoder with its file's vocabulary, which ComfyUI's all-in-one files keep beside it."""
    if match.name != "wan_video_text_encoder" or match.attachments is not None:
        return match
    for _, group in groups:
        if names := [name for name in ATTACHMENTS if name in group]:
            return replace(match, attachments=group.select(names))
    return match


def _by_prefix(checkpoint: Checkpoint) -> list[tuple[str, Checkpoint]]:
    prefixes: dict[str, None] = {}
    for name in checkpoint.shapes:
        found = PREFIX.match(name)
        prefixes.setdefault(found.group() if found else "", None)
    if len(prefixes) == 1:
        (prefix,) = prefixes
        return [(prefix, (checkpoint.without_prefix(prefix) if prefix else checkpoint).unwrapped())]
    groups = []
    for prefix in prefixes:
        names = [n for n in checkpoint.shapes if (m.group() if (m := PREFIX.match(n)) else "") == prefix]
        groups.append((prefix, checkpoint.select(names).without_prefix(prefix).unwrapped()))
    return groups


def _to_official(checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
    found = "official"
    for layout in LAYOUTS:
        if all(mark in checkpoint for mark in layout.marks):
            checkpoint, found = checkpoint.renamed(layout), layout.name
    return checkpoint, found


def _layout_name(prefix: str, layout: str) -> str:
    if "diffusion_model." not in prefix:
        return layout
    return "comfyui" if layout == "official" else f"comfyui+{layout}"


def _matches_in(
    group: Checkpoint, layout: str, prefix: str, rows: Sequence[Architecture], hints: Hints
) -> list[Match]:
    free = dict.fromkeys(name for name in group.shapes if not IGNORED.fullmatch(name))
    found: list[tuple[Architecture, list[str]]] = []
    for row in rows:
        if all(mark in free for mark in row.marks) and row.fits(group.shapes):
            owned = re.compile(row.owns)
            names = [name for name in free if owned.match(name)]
            found.append((row, names))
            for name in names:
                del free[name]
    if not found:
        return []
    attached = [name for name in ATTACHMENTS if name in free]
    left_over = [name for name in free if name not in attached]
    return [
        _match(row, names, group, layout, prefix, hints, attached, left_over if i == 0 else [])
        for i, (row, names) in enumerate(found)
    ]


def _match(
    row: Architecture,
    names: Iterable[str],
    group: Checkpoint,
    layout: str,
    prefix: str,
    hints: Hints,
    attached: list[str],
    left_over: list[str],
) -> Match:
    hints = hints.fresh()
    config = row.config(group.shapes, hints)
    family = row.family if isinstance(row.family, str) else row.family(group.shapes, hints, config)
    own = group.select(names)
    return Match(
        architecture=row,
        family=family or row.name,
        checkpoint=own,
        config=config,
        layout=f"{layout}+{own.quantisation}" if own.quantisation else layout,
        prefix=prefix,
        assumed=list(dict.fromkeys(hints.assumed)),
        missing=hints.missing,
        left_over=left_over,
        generation=hints.generation,
        role=None
        if row.name.endswith(("_vae", "_encoder"))
        else role_of(group.paths, group.metadata, surely=is_of_no_pair(config)),
        attachments=group.select(attached) if attached else None,
    )


def _unknown(
    checkpoint: Checkpoint, groups: list[Checkpoint], rows: Sequence[Architecture]
) -> UnknownCheckpointError:
    best: tuple[int, int] = (0, 0)
    nearest, missing = None, [""]
    for group in groups:
        for row in rows:
            owned = re.compile(row.owns)
            score = (
                sum(bool(owned.match(name)) for name in group.shapes) if row.owns != "." else 0,
                sum(mark in group for mark in row.marks),
            )
            if score > best:
                best, nearest = score, row.name
                missing = [mark for mark in row.marks if mark not in group] or ["other shapes"]
    return UnknownCheckpointError(checkpoint.source, len(checkpoint), nearest, missing)

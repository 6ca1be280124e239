"""Columns beside file and caption: arguments of ``pipe()`` that may differ from clip to clip.

They are taken from the ``Inputs`` of all conditioners, so that a new condition is a new column by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

from diffsynth.errors import ArgumentError
from diffsynth.training.dataset.clips import Value
from diffsynth.training.dataset.tables import CAPTION_COLUMNS, MEDIA_COLUMNS

Kind: TypeAlias = Literal["video", "picture", "pictures", "number", "numbers", "text"]

# Inputs of a whole run, not of one clip: words are the caption's, input_video is what a clip starts from.
_OF_TEXT_AND_START = ("text", "video")
_OF_THE_RUN = frozenset(
    {"resize", "max_area", "tile_size", "tile_stride", "fit", "num_inference_steps", "sampler"}
    | {"sigma_shift", "denoising_strength", "sigmas", "timesteps"}
)
# Facts that tables often carry along; nobody takes them for an input.
_FACTS = frozenset(
    {"id", "idx", "index", "width", "height", "fps", "num_frames", "frames", "duration", "type"}
    | {"caption_source", "url", "hash", "split"}
)
_NEAR = 0.8  # of difflib: two letters of fifteen exchanged


@cache
def known_columns() -> dict[str, Kind]:
    """Names of per-clip inputs and what a cell of them holds."""
    from diffsynth.conditioning.registry import (
        CONDITIONERS,
    )  # brings torch: most datasets have no such column

    known: dict[str, Kind] = {}
    elsewhere = {f.name for kind in _OF_TEXT_AND_START for f in fields(CONDITIONERS[kind].Inputs)}
    for conditioner in CONDITIONERS.values():
        for field in fields(conditioner.Inputs):
            if field.name not in elsewhere | _OF_THE_RUN:
                known[field.name] = _kind(str(field.type))
    return known


def _kind(written: str) -> Kind:
    """What a cell holds, told by the type of the field as it is written."""
    if "Frames" in written:
        return "video"
    if "Frame" in written:
        return "pictures" if "Sequence[Frame" in written else "picture"
    if "Sequence" in written:
        return "numbers"
    return "number" if "float" in written or "int" in written else "text"


def sort_columns(columns: Sequence[str], source: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tell the columns that are inputs from those that nothing reads.

    Returns:
        inputs, unread.

    Raises:
        ArgumentError: when one that nothing reads is nearly the name of an input.
    """
    others = [name for name in columns if name not in (*MEDIA_COLUMNS, *CAPTION_COLUMNS)]
    known = known_columns() if others else {}
    unread = [name for name in others if name not in known]
    for name in unread:
        near = get_close_matches(name.lower(), known, n=1, cutoff=_NEAR)
        if near and name not in _FACTS:
            raise ArgumentError(
                f"{source} has a column {name!r}, which nothing reads. Did you mean {near[0]!r}? Rename the "
                "column, or remove it."
            )
    return tuple(name for name in others if name in known), tuple(unread)


def read_cell(name: str, cell: object, find: Callable[[str], Path]) -> Value:
    """Return what a cell means.

    Args:
        name: of its column, one of `known_columns`.
        cell: as the table holds it, not empty.
        find: gives the path of a file that the table names.

    Raises:
        ArgumentError: for a value of another kind.
    """
    kind = known_columns()[name]
    if kind in ("video", "picture"):
        return find(_as_text(name, cell))
    if kind == "pictures":
        several = cell if isinstance(cell, list) else str(cell).split(";")
        return tuple(find(_as_text(name, one).strip()) for one in several)
    if kind == "text":
        return _as_text(name, cell)
    return _as_numbers(name, cell, is_one=kind == "number")


def _as_text(name: str, cell: object) -> str:
    if isinstance(cell, str):
        return cell
    raise ArgumentError(f"{name} is {cell!r}; give a text.")


def _as_numbers(name: str, cell: object, *, is_one: bool) -> Value:
    """One number, or a list of numbers or of lists of them, as JSON writes it."""
    try:
        told = json.loads(cell) if isinstance(cell, str) else cell
        if not isinstance(told, list):
            return _finite(told)
        if is_one:
            raise ValueError
        if told and isinstance(told[0], list):
            return tuple(tuple(_finite(number) for number in row) for row in told)
        return tuple(_finite(number) for number in told)
    except (ValueError, TypeError):
        wanted = "a number" if is_one else "numbers in brackets: [1.0, 0.5]"
        raise ArgumentError(f"{name} is {cell!r}; give {wanted}.") from None


def _finite(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError
    return number

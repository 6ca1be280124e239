"""Columns beside file and caption: arguments of ``pipe()`` that may differ from clip to clip (scope "clip").

They are declared in the ``Inputs`` of all conditioners, so that a new condition is a new column by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from diffsynth.conditioning.argument import Kind
from diffsynth.errors import ArgumentError
from diffsynth.pipelines.options import call_arguments
from diffsynth.training.dataset.clips import Value
from diffsynth.training.dataset.tables import CAPTION_COLUMNS, MEDIA_COLUMNS

# Facts that tables often carry along; nobody takes them for an input.
_FACTS = frozenset(
    {"id", "idx", "index", "width", "height", "fps", "num_frames", "frames", "duration", "type"}
    | {"caption_source", "url", "hash", "split"}
)
_NEAR = 0.8  # of difflib: two letters of fifteen exchanged


@cache
def known_columns() -> dict[str, Kind]:
    """Names of per-clip inputs and what a cell of them holds."""
    return {name: each.kind for name, each in call_arguments().items() if each.scope == "clip"}


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

"""Rows out of csv, tsv, json and jsonl files, with the line each stands in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth.errors import ArgumentError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
MEDIA_COLUMNS = ("video", "image", "file_name", "file_path")
CAPTION_COLUMNS = ("prompt", "text", "caption")
_WANTED = (
    f"a table needs a column for the file ({', '.join(MEDIA_COLUMNS)}) and one for the words "
    f"({', '.join(CAPTION_COLUMNS)})"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One entry of a table; empty cells are left out."""

    place: str  # "metadata.csv line 3"
    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All rows, and every column that one of them has."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: Path, *, needs_captions: bool = True) -> Table:
    """Read a table whose columns have the names that we know.

    Args:
        path: .csv or .tsv with a header; .json: a list of objects; .jsonl: one object per line. UTF-8.
        needs_captions: whether it must have a column of captions.

    Raises:
        ArgumentError: when it cannot be read, has no header, other names (says which) or no row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror}.") from None
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        rows, columns = _separated(path, text, "\t" if kind == ".tsv" else ",")
    else:
        rows = _lines(path, text) if kind == ".jsonl" else _whole(path, text)
        columns = list(dict.fromkeys(name for row in rows for name in row.values))
    if not rows:
        raise ArgumentError(f"{path} has no row; {_WANTED}.")
    lacking = [
        names
        for names, is_needed in ((MEDIA_COLUMNS, True), (CAPTION_COLUMNS, needs_captions))
        if is_needed and not set(names) & set(columns)
    ]
    if lacking:
        raise ArgumentError(
            f"{path} has the columns {', '.join(columns)}; {_WANTED}. Rename one to {lacking[0][0]!r}"
            + (f" and one to {lacking[1][0]!r}." if len(lacking) > 1 else ".")
        )
    return Table(path=path, columns=tuple(columns), rows=tuple(rows))


def _separated(path: Path, text: str, delimiter: str) -> tuple[list[Row], list[str]]:
    # Not splitlines: it also breaks at characters of Unicode that may stand in a caption.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        columns = [cell.strip() for cell in next(reader, [])]
        _check_header(path, columns)
        for cells in reader:
            place = f"{path.name} line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(columns):
                raise ArgumentError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells and the header {len(columns)} "
                    f'({", ".join(columns)}). A text with a comma stands between quotes: "a cat, asleep".'
                )
            rows.append(Row(place=place, values=_filled(zip(columns, cells, strict=False))))
    except csv.Error as error:
        raise ArgumentError(f"{path}: line {reader.line_num} cannot be read: {error}.") from None
    return rows, columns


def _check_header(path: Path, columns: Sequence[str]) -> None:
    known = {*MEDIA_COLUMNS, *CAPTION_COLUMNS}
    if not any(columns):
        raise ArgumentError(f"{path} is empty; {_WANTED}.")
    if not known & set(columns) and any(Path(cell).suffix[1:].isalnum() for cell in columns):
        raise ArgumentError(
            f"{path} has no header: its first line is {', '.join(columns)!r}; {_WANTED}. Write them into the "
            "first line: file_name,text."
        )
    if twice := {name for name in columns if name and columns.count(name) > 1}:
        raise ArgumentError(f"{path} has the column {sorted(twice)[0]!r} twice; rename one of them.")


def _lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ArgumentError(f"{path}: line {number} is no JSON: {error}.") from None
        rows.append(_object(entry, path, f"line {number}"))
    return rows


def _whole(path: Path, text: str) -> list[Row]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ArgumentError(f"{path} is no JSON: {error}.") from None
    if not isinstance(entries, list):
        raise ArgumentError(
            f'{path} holds no list; give a list of objects: [{{"video": ..., "prompt": ...}}].'
        )
    return [_object(entry, path, f"entry {number}") for number, entry in enumerate(entries, start=1)]


def _object(entry: object, path: Path, where: str) -> Row:
    if not isinstance(entry, dict):
        raise ArgumentError(f"{path}: {where} is {entry!r}; give an object with the columns' names.")
    return Row(place=f"{path.name} {where}", values=_filled(entry.items()))


def _filled(cells: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Cells that hold something; texts without blanks at their ends."""
    stripped = ((name, cell.strip() if isinstance(cell, str) else cell) for name, cell in cells)
    return {name: cell for name, cell in stripped if name and cell not in (None, "", [])}

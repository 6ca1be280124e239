"""``diffsynth inspect``: what a file is, its sizes, what is left over; no weight is read, torch stays out."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from diffsynth.checkpoints.architecture import Match
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.files import FileGroup, PathLike, group_files
from diffsynth.errors import INSPECT_HINT, CheckpointError
from diffsynth.models.registry import ARCHITECTURES

_SHOWN = 12  # names listed before "..."


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one file, or the shards of one model, turned out to be."""

    paths: tuple[str, ...]
    matches: list[Match] = field(default_factory=list)
    error: str = ""  # why it is no usable model; empty when it is
    contents: list[str] = field(default_factory=list)  # of an unknown file: names and shapes, numbers folded


def inspect_paths(paths: PathLike | Sequence[PathLike]) -> list[Report]:
    """Look at headers and say what each model among ``paths`` is.

    Args:
        paths: files, folders, globs, in any mix; the shards of a model are put together.

    Raises:
        CheckpointNotFoundError: when a path does not exist or holds no weights.
        MissingShardError: when a model is split and not all of it is there.
    """
    return [_report(group) for group in group_files(paths)]


def _report(group: FileGroup) -> Report:
    paths = tuple(str(path) for path in group.paths)
    contents: list[str] = []
    try:
        checkpoint = Checkpoint.open_group(group)
        contents = _folded(checkpoint)
        return Report(paths=paths, matches=detect(checkpoint, ARCHITECTURES))
    except CheckpointError as error:
        return Report(paths=paths, error=_error(error, contents, paths[0]), contents=contents)


def _error(error: CheckpointError, contents: Sequence[str], path: str) -> str:
    """Why a file is no model, and what can be done with it instead."""
    if any(line.startswith("latents ") for line in contents):
        command = shlex.join(["diffsynth", "decode", path])
        return f"Latents of a run, no model; this command makes the video of them: {command}"
    return str(error).removesuffix(INSPECT_HINT)


def _folded(checkpoint: Checkpoint) -> list[str]:
    """Return names with ``*`` for numbers, with dtype, shape and count: 30 lines for 1300 tensors."""
    kinds: dict[str, list[str]] = {}
    for name in checkpoint.shapes:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    return [
        f"{kind} {checkpoint.dtypes[names[0]]} {list(checkpoint.shapes[names[0]])}"
        + (f" x {len(names)}" if len(names) > 1 else "")
        for kind, names in kinds.items()
    ]


def to_text(reports: Iterable[Report]) -> str:
    """Render reports for people."""
    lines: list[str] = []
    for report in reports:
        more = f" (+{len(report.paths) - 1} shards)" if len(report.paths) > 1 else ""
        lines.append(f"{report.paths[0]}{more}")
        for match in report.matches:
            lines += [f"  {text}" for text in _lines(match)]
        if report.error:
            lines.append(f"  {report.error}")
            lines += [f"    {text}" for text in _shortened(report.contents)]
        lines.append("")
    return "\n".join(lines)


def _lines(match: Match) -> list[str]:
    row, checkpoint = match.architecture, match.checkpoint
    dtypes = Counter(checkpoint.dtypes.values()).most_common()
    size = f"{checkpoint.num_bytes / 2**30:.2f} GiB"
    rows = [
        ("names", f"{match.layout}, prefix {match.prefix!r}" if match.prefix else match.layout),
        ("sizes", _pairs(match.config)),
        ("weights", f"{match.parameters:,} parameters in {len(checkpoint)} tensors, {size}"),
        ("dtypes", ", ".join(f"{dtype} x {count}" for dtype, count in dtypes)),
        ("built", row.module or f"not by this version. {row.planned_in}"),
    ]
    rows += [("assumed", sentence) for sentence in match.assumed]
    rows += [("missing", sentence) for sentence in match.missing]
    if match.generation:
        rows.append(("defaults", _pairs(match.generation)))
    if match.attachments is not None:
        rows.append(("carries", ", ".join(match.attachments.shapes)))
    if match.left_over:
        rows.append(
            ("left over", f"{len(match.left_over)} tensors: " + ", ".join(_shortened(match.left_over)))
        )
    family = f", {match.family}" if match.family != match.name else ""
    role = f", {match.role}-noise expert" if match.role else ""
    return [f"{match.name}: {row.title}{family}{role}", *(f"  {label:<10}{text}" for label, text in rows)]


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in values.items())


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_shown(item) for item in value) + ")"
    return "none" if value is None else str(value)


def _shortened(names: Sequence[str]) -> list[str]:
    return [*names] if len(names) <= _SHOWN else [*names[:_SHOWN], f"... {len(names) - _SHOWN} more"]


def to_json(reports: Iterable[Report]) -> str:
    """Render reports as a JSON list with one object per network found."""
    return json.dumps([_object(report, match) for report in reports for match in report.matches], indent=2)


def _object(report: Report, match: Match) -> dict[str, object]:
    checkpoint = match.checkpoint
    return {
        "name": match.name,
        "family": match.family,
        "title": match.architecture.title,
        "path": report.paths[0],
        "paths": list(report.paths),
        "layout": match.layout,
        "prefix": match.prefix,
        "role": match.role,
        "is_built": match.architecture.module is not None,
        "config": dict(match.config),
        "parameters": match.parameters,
        "tensors": len(checkpoint),
        "bytes": checkpoint.num_bytes,
        "dtypes": dict(Counter(checkpoint.dtypes.values()).most_common()),
        "assumed": match.assumed,
        "missing": match.missing,
        "left_over": match.left_over,
        "generation": dict(match.generation),
        "attachments": list(match.attachments.shapes) if match.attachments is not None else [],
    }


def run_inspect(paths: list[str], as_json: bool) -> None:
    """Write reports to stdout, and what is wrong with a file to stderr when stdout is JSON.

    Raises:
        CheckpointNotFoundError, MissingShardError: as `inspect_paths`.
        SystemExit: with status 1 when a file is no known network or cannot be read, after all have been
            reported.
    """
    reports = inspect_paths(paths)
    if as_json:
        sys.stdout.write(to_json(reports) + "\n")
        sys.stderr.writelines(f"{report.error}\n" for report in reports if report.error)
    else:
        sys.stdout.write(to_text(reports))
    if any(report.error for report in reports):
        raise SystemExit(1)

"""``diffsynth generate --resume FILE``: a run that was killed between two steps goes on.

The file of steps holds the line that the run was given, resolved and with absolute paths, so that nothing has
to be typed again. Who may choose paths: the line is signed with a key that lies in the user's cache folder.
What this user's own runs wrote is followed as it is, and the results get the run's names. What anybody else
wrote, or another machine, is data only: models and inputs that it names are opened where they lie in the
working folder, the file's own, or ``models``; elsewhere the user has to name them, with the line that the
error tells, and results get new names beside the file. Either way nothing is downloaded, and content is
compared with what the run had (`pipelines.run_facts`).
"""

from __future__ import annotations

import hmac
import json
import math
import os
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.cli.flags import FLAGS, Flag, short_dtype
from diffsynth.cli.generate_task import Picked, opened_video
from diffsynth.cli.naming import Reserved, Resumed
from diffsynth.cli.task_flags import BESIDE_FLAGS, TASK_FLAGS
from diffsynth.conditioning.argument import MEDIA
from diffsynth.errors import ArgumentError, CheckpointNotFoundError, DiffSynthError
from diffsynth.pipelines.options import call_arguments
from diffsynth.video import read_metadata
from diffsynth.video.paths import user_cache

LINE_FLAGS = tuple(flag for flag in FLAGS if flag.name != "debug")
LINE, SIGNATURE, VERSION = "line", "signature", 1  # keys of the metadata, and the form of the line
KEY_BYTES = 32
# Flags that change neither the latents nor how they become a file: now as now given, else as then.
FREE = (
    "device", "vram", "ram", "num_persistent", "quiet", "keep_latents", "save_every", "out", "overwrite",
    "download", *(flag.name for flag in FLAGS if flag.argument is not None and not flag.argument.records),
)  # fmt: skip
OF_THE_RUN = [name for name, each in call_arguments().items() if "file" not in each.records]
_NOT_STORED = ("resume", "download")
_NOTHING: dict[str, Any] = dict.fromkeys(flag.name for flag in LINE_FLAGS)
_WEIGHTS = ("model", "dit", "lora")
_KEPT_BESIDE = ("offload", "t5_cpu", "has_default_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRun:
    """The run that a command goes on with."""

    steps: Path
    names: Resumed | None  # None: it writes under names of its own


def is_path(flag: Flag) -> bool:
    """Whether a flag names files that a run reads, whose content is compared."""
    if flag.argument is not None:
        return flag.argument.kind in MEDIA
    return (flag.kind is Path and flag.name not in ("out", "resume")) or flag.name in _WEIGHTS


def line_note(prompt: str, values: Mapping[str, Any], names: Reserved) -> dict[str, str]:
    """Texts for the file of steps: the line of a run, and the signature of this user.

    Args:
        prompt: of the run.
        values: that `generate.make` was given.
        names: of its results.
    """
    line = json.dumps(
        {
            "version": VERSION,
            "prompt": prompt,
            "values": {
                flag.name: _stored(flag, values[flag.name]) for flag in LINE_FLAGS if _is_told(flag, values)
            },
            "beside": {name: values[name] for name in _KEPT_BESIDE},
            "run_id": names.run_id,
            "paths": [_absolute(path) for path in names.paths],
            "sheet": None if names.sheet is None else _absolute(names.sheet),
        }
    )
    signature = _signature(line)
    return {LINE: line} if signature is None else {LINE: line, SIGNATURE: signature}


def resumed(prompt: str | None, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the prompt and the values for `generate.make` that go on with the run of ``--resume``.

    Args:
        prompt: of this command; None: none.
        given: values of `FLAGS` and `TASK_FLAGS` of this command.

    Raises:
        ArgumentError: for a file without a line, a flag that would make it another run, or paths that the
            user has to name.
        CheckpointNotFoundError: for a file that is not there, or one of the run that is not any more.
    """
    steps: Path = given["resume"].expanduser()
    metadata = Checkpoint.open(steps).metadata
    line = _read_line(steps, metadata)
    is_own = _is_own(metadata)
    then = {flag.name: line["values"].get(flag.name, flag.default) for flag in LINE_FLAGS}
    then = {name: list(value) if value == () else value for name, value in then.items()}
    _check_same(steps, prompt, line["prompt"], given, then)
    now = {flag.name: given[flag.name] for flag in LINE_FLAGS if _is_now(flag, given)}
    values = {**then, **line["beside"], **now}
    recorded = [flag for flag in LINE_FLAGS if is_path(flag) and flag.name not in now]
    names = None
    if is_own:
        _check_there(steps, recorded, values)
        names = Resumed(
            run_id=line["run_id"], paths=tuple(map(Path, line["paths"])),
            sheet=None if line["sheet"] is None else Path(line["sheet"]),
        )  # fmt: skip
        values["overwrite"] = values["overwrite"] or _has_only_own(names, metadata)
    else:
        _check_allowed(steps, recorded, values, now)
        values.update({**_foreign_names(steps, then), **now})
    if "out" in now:
        names = None
        values.update(has_default_out=False, overwrite=given["overwrite"])
    values.update({name: _picked(each) for name, each in values.items() if isinstance(each, Mapping)})
    beside = {**BESIDE_FLAGS, **{name: values[name] for name in _KEPT_BESIDE}}
    beside["from_file"] = tuple(name for name in then if name not in now)
    return line["prompt"], {**values, **beside, "resumed": SavedRun(steps=steps, names=names)}


def check_save_every(every: int | None) -> None:
    """Raise ArgumentError for a number of steps that cannot be."""
    if every is not None and every < 0:
        raise ArgumentError(
            f"--save-every is {every}; give a number of steps, 0 for never, or leave it out: steps are then "
            "saved after each minute of work."
        )


def steps_arguments(prompt: str, values: Mapping[str, Any], names: Reserved) -> dict[str, Any]:
    """Arguments of `pipe()`: where steps are saved, how often, and which go on.

    Args:
        prompt: of the run.
        values: that `generate.make` was given.
        names: of its results.
    """
    from diffsynth.pipelines.saved_latents import shell_word
    from diffsynth.pipelines.saved_steps import StepsPath

    run, every = values["resumed"], values["save_every"]
    told: dict[str, Any] = {} if run is None else {"resume_from": run.steps}
    if every == 0:
        return told
    path = _steps_file(names)
    target = StepsPath(
        path=path, note=lambda: line_note(prompt, values, names),
        advice=f"diffsynth generate --resume {shell_word(str(path))}",
    )  # fmt: skip
    return {**told, "save_steps": target, "save_every": every}


def forget_steps(values: Mapping[str, Any], names: Reserved) -> None:
    """Remove what a run has saved of its steps: its latents are on the disk."""
    run = values["resumed"]
    for path in {_steps_file(names), *(() if run is None else (run.steps,))}:
        with suppress(OSError):
            path.unlink()


def _steps_file(names: Reserved) -> Path:
    from diffsynth.pipelines.saved_latents import steps_beside

    return steps_beside(Path(_absolute(names.paths[0])), names.run_id)


def flags_for(differences: Iterator[str] | tuple[str, ...]) -> str:
    """What `ResumeError` tells, with flags in place of arguments."""
    spelled = {flag.name: _spelling(flag) for flag in FLAGS}
    lines = []
    for line in differences:
        name, _, rest = line.partition(" ")
        lines.append(f"{spelled.get(name, name)} {rest}")
    return "; ".join(lines)


# ---- the line ---------------------------------------------------------------------


def _is_told(flag: Flag, values: Mapping[str, Any]) -> bool:
    return flag.name not in _NOT_STORED and _is_given(values[flag.name])


def _is_given(value: object) -> bool:
    return value is not None and value not in ([], ())


def _is_now(flag: Flag, given: Mapping[str, Any]) -> bool:
    """Whether this command gives a flag; a switch that is off is not given."""
    value = given[flag.name]
    return _is_given(value) and not (flag.default is False and value is False)


def _stored(flag: Flag, value: Any) -> object:
    if isinstance(value, Picked):
        return {"file": _absolute(value.source), "frames": list(value.frames)}
    if flag.name == "lora":
        return [_absolute_lora(each) for each in value]
    if flag.name in _WEIGHTS:
        return [_absolute_weights(each) for each in value]
    if isinstance(value, list):
        return [_absolute(each) if isinstance(each, Path) else each for each in value]
    return _absolute(value) if isinstance(value, Path) else value


def _absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_weights(given: str) -> str:
    """A file, folder or pattern; an id stands for the folder that it was downloaded to."""
    from diffsynth.models.download import folder_of_id, looks_like_id

    is_id = looks_like_id(given) and not Path(given).expanduser().exists()
    return _absolute(folder_of_id(given) if is_id else given)


def _absolute_lora(given: str) -> str:
    path, _, strength = given.rpartition(":")
    if Path(given).exists() or not path or not Path(path).exists():
        return _absolute(given)
    return f"{_absolute(path)}:{strength}"


def _read_line(steps: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The line of a file, every value of the type that its flag has."""
    if LINE not in metadata:
        if "steps" in metadata:
            raise ArgumentError(
                f"{steps} was written by pipe(save_steps=...), not by diffsynth generate; go on with "
                "pipe(..., resume_from=...)."
            )
        from diffsynth.pipelines.saved_steps import read_steps

        read_steps(steps)  # says what the file is
    flags = {flag.name: flag for flag in LINE_FLAGS if flag.name not in _NOT_STORED}
    try:
        line = json.loads(metadata[LINE])
        if line["version"] != VERSION:
            raise ArgumentError(f"{steps} was written by another version of diffsynth; begin the run anew.")
        line["values"] = {name: _typed(flags[name].kind, value) for name, value in line["values"].items()}
        beside = {name: _typed(bool, line["beside"][name]) for name in _KEPT_BESIDE}
        is_sound = (
            isinstance(line["prompt"], str)
            and re.fullmatch("[0-9a-f]{8}", line["run_id"]) is not None
            and isinstance(line["paths"], list)
            and len(line["paths"]) > 0
            and all(isinstance(path, str) for path in line["paths"])
            and isinstance(line["sheet"], str | None)
        )
    except ArgumentError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise ArgumentError(f"{steps} was changed: its {LINE!r} is not what diffsynth generate writes.")
    return {**line, "beside": beside}


def _typed(kind: Any, value: Any) -> Any:  # noqa: PLR0911 (a table of kinds)
    """A value of JSON as the type of its flag; ValueError where it is none."""
    if kind is Path and isinstance(value, dict):
        frames = value["frames"]
        if not (isinstance(value["file"], str) and all(_is_whole(each) and each >= 0 for each in frames)):
            raise ValueError
        return {"file": value["file"], "frames": list(frames)}
    if kind in (list[Path], list[str]) and isinstance(value, list):
        return [_typed(Path if kind == list[Path] else str, each) for each in value]
    if kind == tuple[int, int] and isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value)):
        return tuple(value)
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value).value
    elif (kind is int and _is_whole(value)) or (kind in (str, bool) and isinstance(value, kind)):
        return value
    raise ValueError


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _picked(told: Mapping[str, Any]) -> Picked:
    source = Path(told["file"])
    return Picked(opened_video(source), told["frames"], source)


# ---- what this command may say otherwise --------------------------------------------


def _check_same(
    steps: Path, prompt: str | None, then_prompt: str, given: Mapping[str, Any], then: Mapping[str, Any]
) -> None:
    """Raise for whatever this command says that would make it another run."""
    told = given["prompt_text"] if prompt is None else prompt
    found = (
        [] if told in (None, then_prompt) else [f"the prompt is {told!r} and the run's is {then_prompt!r}"]
    )
    for flag in LINE_FLAGS:
        now = given[flag.name]
        if flag.name in (*FREE, "resume") or is_path(flag) or not _is_now(flag, given):
            continue
        if now != then[flag.name] and not _is_same_dtype(flag, now, then[flag.name]):
            had = then[flag.name] if _is_given(then[flag.name]) else "not given"
            found.append(f"{_spelling(flag)} is {now} and the run's is {had}")
    for flag in TASK_FLAGS:
        if flag.name != "prompt_text" and given[flag.name] not in (None, False):
            found.append(f"{_spelling(flag)} is part of a line that begins a run")
    if found:
        raise ArgumentError(
            f"--resume {steps} goes on with a run as it was begun, but {'; '.join(found)}. Leave that out, "
            "or leave --resume out to begin anew."
        )


def _is_same_dtype(flag: Flag, now: object, then: object) -> bool:
    return flag.name == "dtype" and short_dtype(str(now)) == short_dtype(str(then))


def _check_there(steps: Path, flags: list[Flag], values: Mapping[str, Any]) -> None:
    """Raise for files of the run that are not there any more."""
    for flag, path in _named(flags, values):
        if not os.path.lexists(path) and not set("*?[") & set(str(path)):
            raise CheckpointNotFoundError(
                f"The run of {steps} had {_spelling(flag)} {path}, which is not there any more. Say where it "
                f"is now:\n  diffsynth generate --resume {shlex.quote(str(steps))} {_spelling(flag)} PATH"
            )


def _has_only_own(names: Resumed, metadata: Mapping[str, str]) -> bool:
    """Whether what has the run's names already was made with its settings and seeds, so that nothing is lost.

    A run with a contact sheet may have died when some of its videos were done; they are made again.
    """
    try:
        told = json.loads(metadata["steps"])
        settings = {n: v for n, v in told["facts"]["settings"].items() if v != "" and n not in OF_THE_RUN}
        seeds = {path: told["seed"] + index for index, path in enumerate(names.paths)}
        if names.sheet is not None:
            seeds[names.sheet] = told["seed"]
        made = {path: read_metadata(path) for path in seeds if os.path.lexists(path)}
    except (ValueError, TypeError, KeyError, AttributeError, OSError, DiffSynthError):
        return False
    wanted = {path: {**settings, "seed": seeds[path]} for path in made}
    return bool(made) and all(
        own.get(name) == value for path, own in made.items() for name, value in wanted[path].items()
    )


def _check_allowed(steps: Path, flags: list[Flag], values: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise for paths outside the folders that a foreign file may name things in."""
    named = [path for _, path in _named([flag for flag in LINE_FLAGS if is_path(flag)], {**_NOTHING, **now})]
    places = [
        ".",
        steps.parent,
        "models",
        *(path if os.path.isdir(path) else Path(path).parent for path in named),
    ]
    roots = [Path(os.path.realpath(place)) for place in places]
    words: list[str] = []
    for flag, path in _named(flags, values):
        if any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            continue
        shown = str(path) if str(path).isprintable() else "PATH"
        words += [_spelling(flag), shlex.quote(shown)]
    if words:
        raise ArgumentError(
            f"{steps} is of no run of yours on this machine, so that what it names is opened only in the "
            f"working folder, beside it, and in models. If these are the files that you mean, name them:\n"
            f"  diffsynth generate --resume {shlex.quote(str(steps))} {' '.join(words)}"
        )


def _named(flags: list[Flag], values: Mapping[str, Any]) -> Iterator[tuple[Flag, str | Path]]:
    """Every path of these flags."""
    for flag in flags:
        value = values[flag.name]
        if isinstance(value, Mapping):
            value = Path(value["file"])
        for each in value if isinstance(value, list) else [value]:
            if _is_given(each):
                yield flag, _lora_file(each) if flag.name == "lora" else each


def _lora_file(given: str) -> str:
    path, _, strength = given.rpartition(":")
    with suppress(ValueError):
        float(strength)
        return path or given
    return given


def _foreign_names(steps: Path, then: Mapping[str, Any]) -> dict[str, Any]:
    """Where a file that may not choose it has its results: beside it, as of a run without --out."""
    name = Path(str(then["out"] or "video.mp4")).name
    safe = name if name.isprintable() and Path(name).suffix else "video.mp4"
    return {"out": steps.parent / safe, "has_default_out": True, "overwrite": False, "cache_text": None}


def _spelling(flag: Flag) -> str:
    return flag.all_spellings[0].split("/")[0]


# ---- whose file it is -----------------------------------------------------------------


def _is_own(metadata: Mapping[str, str]) -> bool:
    expected = _signature(metadata[LINE], makes_key=False)
    told = metadata.get(SIGNATURE, "")
    return expected is not None and hmac.compare_digest(expected.encode(), told.encode("utf-8", "replace"))


def _signature(line: str, *, makes_key: bool = True) -> str | None:
    """Of a line, by this user's key; None without a key."""
    key = _key(makes_key)
    return None if key is None else hmac.new(key, line.encode(), "sha256").hexdigest()


def _key(makes_key: bool) -> bytes | None:
    """The user's key, which is made when it is first needed; None where it cannot be kept."""
    try:
        file = user_cache() / "steps.key"
        if makes_key:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileExistsError):
                descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with os.fdopen(descriptor, "wb") as opened:
                    opened.write(secrets.token_bytes(KEY_BYTES))
        for _ in range(20):  # another process may be about to write it
            key = file.read_bytes()
            if len(key) == KEY_BYTES:
                return key
            time.sleep(0.01)
    except (OSError, RuntimeError):
        pass
    return None

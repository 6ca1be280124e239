"""A run's settings: from YAML and ``--key.sub value`` flags to dataclasses, and back to YAML.

Everything here follows from the dataclasses: a field's name is its key and its flag, its type decides what is
accepted.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from diffsynth.errors import ArgumentError, UnknownArgumentError
from diffsynth.training.config_table import either, inner_dataclass, rows
from diffsynth.video.paths import replacing

T = TypeVar("T")
# Flags that mean several settings at once: nothing may be left out, neither of the data nor of the cache.
EVERYWHERE = {"strict": ("data", "cache")}
_BY_TYPE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class _Typed(str):
    """A value from the command line: read as what its field wants, where YAML would guess."""

    __slots__ = ()


def load_config(cls: type[T], path: str | Path | None, flags: Sequence[str] = ()) -> T:
    """Read a YAML file, lay flags over it, and check everything.

    Args:
        cls: the outermost dataclass.
        path: the file; None: defaults and flags only.
        flags: ``--key.sub value`` or ``--key.sub=value``, as typed. A field's own name is enough where only
            one section has it; an item of a list goes by its number, ``--data.0.path``.

    Raises:
        ArgumentError: for a file that is not there or no YAML, or a value of another kind; names the place.
        UnknownArgumentError: for a key that nothing reads, with the nearest name.
    """
    content: dict[str, Any] = {}
    if path is not None:
        content = _read(Path(path))
    # What goes to several places comes last, when all of them are known.
    for key, value in sorted(_pairs(cls, flags), key=lambda pair: pair[0] in EVERYWHERE):
        for place in _places(content, key):
            _lay_over(cls, content, place, value)
    built: T = build(cls, content, "")
    return built


def save_config(config: object, path: Path) -> None:
    """Write the settings, whole, as YAML that `load_config` reads; the file appears when it is complete."""
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: object) -> str:
    """The settings with every default spelt out."""
    return str(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=110))


def build(cls: Any, value: object, where: str) -> Any:
    """Make a value of a type out of what YAML or a flag gave.

    Args:
        cls: a dataclass, or the type of one of its fields.
        value: of YAML, or a text from the command line.
        where: dotted place, for messages.
    """
    if is_dataclass(cls):
        return _dataclass(cls, value, where)
    origin, inner = get_origin(cls), get_args(cls)
    if origin in (Union, types.UnionType):
        return _union(inner, value, where)
    if origin is Literal:
        return _choice(inner, value, where)
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is not None and issubclass(origin, Mapping):
        given = _parsed(value)
        if not isinstance(given, dict):
            raise ArgumentError(
                f"{where} is {value!r}; give names with values, such as {{weight_decay: 0.01}}."
            )
        return {str(k): build(inner[1], v, f"{where}.{k}") for k, v in given.items()}
    return _scalar(cls, value, where)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArgumentError(f"{path} does not exist; give the YAML file of a run (train/recipes has some).")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is no YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ArgumentError(
            f"{path} holds {type(content).__name__}; expected keys with values, such as run: ..."
        )
    return content


def _pairs(cls: Any, flags: Sequence[str]) -> Iterator[tuple[str, _Typed]]:
    position = 0
    while position < len(flags):
        flag = flags[position]
        if not flag.startswith("--"):
            raise ArgumentError(f"{flag!r} follows no --key; flags are --key value, such as --run.steps 500.")
        name, has_value, value = flag[2:].partition("=")
        position += 1
        if not has_value:
            following = flags[position] if position < len(flags) else None
            if following is None or following.startswith("--"):
                value = "true"  # a switch
            else:
                value, position = following, position + 1
        yield _full_key(cls, name.replace("-", "_")), _Typed(value)


def _places(content: Mapping[str, Any], key: str) -> list[str]:
    """Where a flag's value goes: one place, or all of a wish that has several."""
    if key not in EVERYWHERE:
        return [key]
    found = []
    for section in EVERYWHERE[key]:
        several = content.get(section)
        found += (
            [f"{section}.{number}.{key}" for number in range(len(several))]
            if isinstance(several, list)
            else [f"{section}.{key}"]
        )
    return found


def _full_key(cls: Any, key: str) -> str:
    if "." in key or key in {field.name for field in fields(cls)} or key in EVERYWHERE:
        return key
    found = [row.key for row in rows(cls) if row.key.rpartition(".")[2] == key]
    if len(found) > 1:
        raise ArgumentError(
            f"--{key} may be {' or '.join('--' + name for name in found)}; give the whole name."
        )
    if not found:
        raise UnknownArgumentError(
            key, {row.key.rpartition(".")[2] for row in rows(cls)}, "the settings of training"
        )
    return found[0]


def _lay_over(cls: Any, content: dict[str, Any], key: str, value: _Typed) -> None:
    here: Any = content
    parts = key.split(".")
    hint: Any = cls
    for depth, part in enumerate(parts):
        place = ".".join(parts[: depth + 1])
        hint = _hint_of(hint, part, place)
        is_last = depth == len(parts) - 1
        if isinstance(here, list):
            index = int(part)
            if index > len(here):
                raise ArgumentError(
                    f"--{key}: the list has {len(here)} entries; the next is number {len(here)}."
                )
            if index == len(here):
                here.append({})
            if is_last:
                here[index] = value
            here = here[index]
            continue
        if is_last:
            here[part] = value
        elif here.get(part) is None:
            here[part] = [] if parts[depth + 1].isdigit() else {}
        here = here[part]
        if not is_last and not isinstance(here, (dict, list)):
            raise ArgumentError(
                f"--{key}: {place} is {here!r} in the file, which has no {parts[depth + 1]!r}."
            )
        if isinstance(here, list) and not is_last and not parts[depth + 1].isdigit():
            raise ArgumentError(
                f"--{key}: {place} is a list; say which entry, such as --{place}.0.{parts[-1]}."
            )


def _hint_of(hint: Any, part: str, place: str) -> Any:
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        if part not in hints:
            raise UnknownArgumentError(part, hints, _where(place.rpartition(".")[0]))
        return hints[part]
    inner = inner_dataclass(hint)
    return inner if inner is not None and part.isdigit() else Any


def _dataclass(cls: Any, value: object, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        names = ", ".join(field.name for field in fields(cls))
        raise ArgumentError(f"{where} is {value!r}; expected keys with values: {names}.")
    hints = get_type_hints(cls)
    given = {}
    for key, inner in value.items():
        if key not in hints:
            raise UnknownArgumentError(str(key), hints, _where(where))
        given[key] = build(hints[key], inner, f"{where}.{key}" if where else str(key))
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in given]:
        raise ArgumentError(f"{_where(where)} lacks {', '.join(missing)}; give a value.")
    return cls(**given)


def _where(place: str) -> str:
    return f"the section {place!r}" if place else "a training config"


def _union(kinds: Sequence[Any], value: object, where: str) -> Any:
    if value is None or (isinstance(value, _Typed) and value.lower() in ("none", "null", "~")):
        if type(None) in kinds:
            return None
        raise ArgumentError(f"{where} is empty; give {either(kinds)}.")
    reasons = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return build(kind, value, where)
        except UnknownArgumentError:
            raise
        except ArgumentError as error:
            reasons.append(error)
    if len(reasons) == 1:
        raise reasons[0]
    raise ArgumentError(f"{where} is {value!r}; give {either(kinds)}.")


def _choice(choices: Sequence[object], value: object, where: str) -> object:
    for choice in choices:
        if value == choice or (isinstance(value, _Typed) and str(choice) == value):
            return choice
    nearest = get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ArgumentError(f"{where} is {value!r}; give one of {', '.join(map(str, choices))}.{hint}")


def _tuple(inner: Sequence[Any], value: object, where: str) -> tuple[Any, ...]:
    if isinstance(value, _Typed):
        text = value.strip()
        value = (
            yaml.safe_load(text)
            if text.startswith("[")
            else [_Typed(p.strip()) for p in text.split(",") if p]
        )
    if not isinstance(value, (list, tuple)):
        raise ArgumentError(f"{where} is {value!r}; expected a list, such as [{value!r}].")
    if len(inner) == 2 and inner[1] is ...:
        return tuple(build(inner[0], one, f"{where}.{i}") for i, one in enumerate(value))
    if len(value) != len(inner):
        raise ArgumentError(f"{where} has {len(value)} values ({list(value)}); expected {len(inner)}.")
    return tuple(
        build(kind, one, f"{where}.{i}") for i, (kind, one) in enumerate(zip(inner, value, strict=True))
    )


def _scalar(kind: Any, value: object, where: str) -> object:
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is Any or kind is object:
        return _parsed(value)
    given = _parsed(value)
    if kind is bool and isinstance(given, bool):
        return given
    if kind in (int, float) and isinstance(given, str):
        given = _number(given)  # YAML reads 1e-4 as a text
    if (
        kind is int
        and isinstance(given, (int, float))
        and not isinstance(given, bool)
        and given == int(given)
    ):
        return int(given)
    if kind is float and isinstance(given, (int, float)) and not isinstance(given, bool):
        return float(given)
    raise ArgumentError(f"{where} is {value!r} ({type(given).__name__}); give {_BY_TYPE.get(kind, kind)}.")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _parsed(value: object) -> object:
    if not isinstance(value, _Typed):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return str(value)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value

"""A run's settings as a table, for documents and ``--help``: made of the dataclasses and their comments."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One field, as the table and ``--help`` show it."""

    key: str  # dotted
    kind: str
    default: str
    help: str


def rows(cls: Any, prefix: str = "") -> Iterator[Row]:
    """Every field of a dataclass and of those inside it."""
    helps, hints = _comments(cls), get_type_hints(cls)
    for field in fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        inner = inner_dataclass(kind)
        if inner is not None:
            yield from rows(inner, f"{key}." if inner is kind else f"{key}.0.")
        else:
            yield Row(key=key, kind=kind_of(kind), default=_default(field), help=helps.get(field.name, ""))


def table(cls: Any) -> str:
    """The settings as a Markdown table."""
    cells = [(f"`{row.key}`", row.kind, row.default, row.help) for row in rows(cls)]
    lines = ["| key | value | default | what it is |", "|---|---|---|---|"]
    return "\n".join(
        lines + ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in cells]
    )


def help_text(cls: Any) -> str:
    """The settings as ``--help`` shows them."""
    return "\n".join(f"  --{row.key} {row.kind} [{row.default}]\n        {row.help}" for row in rows(cls))


def inner_dataclass(kind: Any) -> Any:
    """The dataclass that a field is, or a list of; None for plain fields."""
    if is_dataclass(kind):
        return kind
    inner = get_args(kind)
    return inner[0] if get_origin(kind) is tuple and inner and is_dataclass(inner[0]) else None


def kind_of(kind: Any) -> str:
    """What a field takes, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return either(inner)
    if origin is Literal:
        return " \\| ".join(map(str, inner)).replace("\\", "")
    if origin is tuple:
        return f"list of {kind_of(inner[0])}" if inner[-1] is ... else f"{len(inner)} x {kind_of(inner[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return "names with values"
    return {int: "integer", float: "number", bool: "true | false", str: "text"}.get(kind, str(kind))


def either(kinds: Sequence[Any]) -> str:
    """What one of several types takes, in words."""
    return " or ".join(kind_of(one) for one in kinds if one is not type(None))


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        value: object = field.default_factory()
    elif field.default is MISSING:
        return "required"
    else:
        value = field.default
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@cache
def _comments(cls: Any) -> dict[str, str]:
    """What stands behind each field, after the lines of comment above it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines, found = source.splitlines(), dict[str, str]()
    (whole,) = ast.parse(source).body
    assert isinstance(whole, ast.ClassDef)
    for node in whole.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            comments = [re.search(r"# (.*)$", line) for line in lines[first : node.end_lineno]]
            found[node.target.id] = " ".join(comment[1].strip() for comment in comments if comment)
    return found

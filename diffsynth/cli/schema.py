"""``diffsynth schema``: the arguments of a generation as they are declared, for forms, servers and agents."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import typer

from diffsynth.cli.flags import FLAGS
from diffsynth.conditioning.argument import Argument
from diffsynth.models.kinds import facts_of_kind
from diffsynth.models.table import MODELS, ModelRow, inputs_needed
from diffsynth.pipelines.options import CallOptions, call_arguments
from diffsynth.pipelines.unread import OF_TWO_EXPERTS, names_read_by

VERSION = 1  # of the form below


def run_schema(as_json: bool) -> None:
    """Print the arguments, and with ``as_json`` what each kind of model reads of them."""
    if as_json:
        typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))
        return
    for each in call_arguments().values():
        default = "" if _plain(each.default) in (None, "", []) else f" = {_plain(each.default)}"
        typer.echo(f"{each.name}: {each.type}{default}\n    {each.help}")


def schema() -> dict[str, Any]:
    """Return what ``--json`` prints: every argument, and what each released model reads and needs."""
    arguments = call_arguments().values()
    return {
        "version": VERSION,
        "arguments": [_told(each) for each in arguments],
        "models": [_model(row) for row in MODELS],
    }


def _told(each: Argument) -> dict[str, Any]:
    flags = [list(flag.all_spellings) for flag in FLAGS if flag.argument is each]
    return {
        "name": each.name, "type": each.type, "kind": each.kind, "default": _plain(each.default),
        "help": each.help, "unit": each.unit or None, "choices": list(each.choices) or None,
        "group": each.group, "scope": each.scope, "flags": flags[0] if flags else [],
    }  # fmt: skip


def _model(row: ModelRow) -> dict[str, Any]:
    facts = facts_of_kind(row.kind)
    read = {each.name for each in fields(CallOptions)} | names_read_by(facts)
    read -= set(OF_TWO_EXPERTS) if row.num_experts == 1 else set()
    return {
        "title": row.title, "kind": row.kind, "experts": row.num_experts, "needs": list(inputs_needed(facts)),
        "reads": [name for name in call_arguments() if name in read],
    }  # fmt: skip


def _plain(value: object) -> Any:
    """A default as JSON holds it; objects of Python are None."""
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, (bool, int, float, str)) else None

"""Writes `pipelines/typed_call.py`: what editors and type checkers know of ``pipe(...)``.

``python -m diffsynth.pipelines.call_stub`` writes it anew; a test says when that is needed. At run time the
call takes any keyword and answers a wrong one in words: this file is for those who read without running.
"""

from __future__ import annotations

import ast
import builtins
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from diffsynth.conditioning.argument import names_read
from diffsynth.pipelines.foreign_arguments import ADVERTISED
from diffsynth.pipelines.options import call_arguments, readers_of_calls

TARGET = Path(__file__).with_name("typed_call.py")
POSITIONAL = ("prompt", "negative_prompt")
WIDTH = 110  # characters of a line
HEAD = '''"""What a type checker and an editor know of ``pipe(...)``; nothing runs it.

Generated from the declarations of the arguments: python -m diffsynth.pipelines.call_stub
"""

from __future__ import annotations

'''
LEGEND = '''    """Make videos; see `WanVideoPipeline.__call__`.

    Args:
        self: the pipeline.
'''
TAIL = '''
    Returns:
        As ``output_type`` asks: a list of PIL frames, or of such lists for a batch; a tensor; an array.
    """
    raise NotImplementedError
'''


def stub() -> str:
    """Return the text of the file."""
    modules = [sys.modules[reader.__module__] for reader in readers_of_calls()]
    homes: dict[str, str] = {}
    for module in modules:
        for name, line in _imports(module):
            homes.setdefault(name, line)
    arguments = call_arguments()
    listed = [arguments[name] for name in names_read(readers_of_calls())]
    declared = {each.name: (each.type.replace("'", '"'), each.default) for each in listed}
    declared.update({name: ("object", default) for name, default in ADVERTISED.items()})
    told = {name: (type_, _default(default, modules, homes)) for name, (type_, default) in declared.items()}
    lines = [f"    {name}: {type_} = {default},\n" for name, (type_, default) in told.items()]
    used = {name for type_, default in told.values() for name in _names_in(type_, default)}
    imports = sorted({homes[name] for name in used} | {"from typing import Any"}, key=_import_order)
    call = "".join([*lines[: len(POSITIONAL)], "    *,\n", *lines[len(POSITIONAL) :]])
    helps = "".join([_help(each.name, each.help) for each in listed])
    helps += "".join([_help(name, "Not read; v1 had it.") for name in ADVERTISED])
    return (
        f"{HEAD}{_joined(imports)}\n\ndef call(  # noqa: PLR0913\n    self: object,\n{call}) -> Any:\n"
        f"{LEGEND}{helps}{TAIL}"
    )


def _imports(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Names that a module imports at its top, also for type checkers alone, each with its line."""
    assert module.__file__ is not None
    top = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    inner = [each for node in top if isinstance(node, ast.If) for each in node.body]
    for node in [*top, *inner]:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                yield alias.name, f"from {node.module} import {alias.name}"


def _default(value: object, modules: list[ModuleType], homes: dict[str, str]) -> str:
    """A default as source; what is no plain value is imported by its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return f'"{value}"' if isinstance(value, str) else repr(value)
    for module in modules:
        for name, each in vars(module).items():
            if each is value:
                homes.setdefault(name, f"from {module.__name__} import {name}")
                return name
    raise TypeError(f"{value!r} is a default that has no name in its module.")


def _names_in(*sources: str) -> Iterator[str]:
    for source in sources:
        for node in ast.walk(ast.parse(source, mode="eval")):
            if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
                yield node.id


def _help(name: str, told: str) -> str:
    text = f"{name}: {told}"
    return textwrap.fill(text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12) + "\n"


def _import_order(line: str) -> tuple[int, str]:
    """The standard library, other packages, ours, as ruff sorts them."""
    package = line.split()[1].partition(".")[0]
    group = 2 if package == "diffsynth" else 0 if package in sys.stdlib_module_names else 1
    return group, line


def _joined(lines: list[str]) -> str:
    """Import lines, those of one module as one, groups apart."""
    modules: dict[str, list[str]] = {}
    for line in lines:
        modules.setdefault(line.split()[1], []).append(line.split()[3])
    text, before = "", 0
    for module, names in modules.items():
        group = _import_order(f"from {module} import x")[0]
        text += "\n" * (group != before and bool(text)) + f"from {module} import {', '.join(names)}\n"
        before = group
    return text


if __name__ == "__main__":
    TARGET.write_text(stub(), encoding="utf-8")

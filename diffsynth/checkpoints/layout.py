"""Rules that rename tensors, written once and read in both directions.

A row pairs the official name with the other one. ``{name}`` stands for the same text on both sides (see
GROUPS); ``{i*s+j}`` is a number that is computed (see NUMBERS). Beside a renaming a row can say that one
official tensor is the concatenation of several others, that axes of size 1 are dropped, that a matrix is
transposed, or that a tensor has no counterpart at all. Tensors that no row knows keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

GROUPS = {
    "b": r"(?:vace_)?blocks\.\d+",
    "v": r"vace_blocks\.\d+",
    "n": r"\d{1,6}",
    "i": r"\d{1,6}",
    "j": r"\d{1,6}",
    "m": r"\d{1,6}",
    "p": r"weight|bias",
    "qkv": r"[qkv]",
    "qkvo": r"[qkvo]",
    "qk": r"[qk]",
    "kv": r"[kv]",
    "12": r"[12]",
    "123": r"conv1_local|conv2|conv3",
    "side": r"encoder|decoder",
    "attention": r"norm\.gamma|(?:to_qkv|proj)\.(?:weight|bias)",
    "sample": r"(?:resample\.1|time_conv)\.(?:weight|bias)",
    "any": r".+",
}
Numbers = Mapping[str, int]
# name: (from the number and the stride s to its letters, or None if it cannot be; from the letters back)
NUMBERS: dict[str, tuple[Callable[[int, int], dict[str, int] | None], Callable[[Numbers, int], int]]] = {
    "i*s+j": (lambda n, s: {"i": n // s, "j": n % s}, lambda g, s: g["i"] * s + g["j"]),
    "i*s+s-1": (lambda n, s: {"i": n // s} if n % s == s - 1 else None, lambda g, s: g["i"] * s + s - 1),
    "m+1": (lambda n, s: {"m": n - 1} if n else None, lambda g, s: g["m"] + 1),
    "s-1": (lambda n, s: {} if n == s - 1 else None, lambda g, s: s - 1),
    "s-2": (lambda n, s: {} if n == s - 2 else None, lambda g, s: s - 2),
}
TOKEN = re.compile(r"\{([^}]+)\}")


@dataclass(frozen=True, slots=True)
class Row:
    """One rule; None on a side means that the tensor has no counterpart there and is dropped."""

    official: str | None
    other: str | tuple[str, ...] | None  # several: the official tensor is their concatenation, rows first
    ones: tuple[int, int] = (0, 0)  # axes of size 1 that only the official tensor has, in front and behind
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """How one tensor of the renamed checkpoint is made of the old ones."""

    sources: tuple[str, ...]  # several: concatenated along axis 0
    chunk: tuple[int, int] = (0, 1)  # piece k of n along axis 0
    ones: tuple[int, int] = (0, 0)  # axes of size 1 added in front and behind; negative: taken away
    transposed: bool = False


class _Template:
    """A name with holes: finds them in a name, and fills them."""

    def __init__(self, text: str, stride: int) -> None:
        self._pieces = TOKEN.split(text)  # literal, token, literal, token, ..., literal
        self._stride = stride
        self.prefix = self._pieces[0]
        pattern, seen = "", set()
        for position, piece in enumerate(self._pieces):
            if position % 2 == 0:
                pattern += re.escape(piece)
            elif piece in NUMBERS:
                pattern += rf"(?P<x{position}>\d{{1,6}})"
            elif piece in seen:
                pattern += f"(?P=g{piece})"
            else:
                pattern += f"(?P<g{piece}>{GROUPS[piece]})"
                seen.add(piece)
        self._pattern = re.compile(pattern)

    def find(self, name: str) -> dict[str, str] | None:
        found = self._pattern.fullmatch(name) if name.startswith(self.prefix) else None
        if found is None:
            return None
        holes: dict[str, str] = {}
        for key, text in found.groupdict().items():
            if key[0] == "g":
                holes[key[1:]] = text
                continue
            letters = NUMBERS[self._pieces[int(key[1:])]][0](int(text), self._stride)
            if letters is None:
                return None
            holes.update({letter: str(number) for letter, number in letters.items()})
        return holes

    def fill(self, holes: Mapping[str, str]) -> str:
        numbers = {key: int(text) for key, text in holes.items() if text.isdecimal()}
        return "".join(
            piece
            if position % 2 == 0
            else str(NUMBERS[piece][1](numbers, self._stride))
            if piece in NUMBERS
            else holes[piece]
            for position, piece in enumerate(self._pieces)
        )


@dataclass(frozen=True)
class KeyLayout:
    """How another project names the tensors of a network, and how to get to the official names or back.

    ``Checkpoint.renamed(layout)`` renames to the official names, ``Checkpoint.renamed(layout.inverse())`` to
    the other ones.
    """

    name: str  # "diffusers"
    marks: tuple[str, ...]  # names that only this layout has
    rows: tuple[Row, ...]
    to_official: bool = True
    # Blocks per stage and its up-sampler, in flat lists of the VAE; measured from the names in either layout.
    stride: Callable[[Iterable[str]], int] = lambda names: 4

    def inverse(self) -> KeyLayout:
        """Return the same rules, read from the official names to the other ones."""
        return replace(self, to_official=not self.to_official)

    def plan(self, names: Iterable[str]) -> dict[str, Step]:
        """Return, for each name after the renaming, how it is made of ``names``."""
        names = list(names)
        rules = _Rules(self, self.stride(names))
        return rules.merge(names) if self.to_official else rules.split(names)


class _Rules:
    """The rows of a layout, compiled for one stride."""

    def __init__(self, layout: KeyLayout, stride: int) -> None:
        self._layout, self._stride = layout, stride

    def _compiled(self, text: str | None) -> _Template | None:
        return None if text is None else _Template(text, self._stride)

    @cached_property
    def _others(self) -> list[tuple[int, int, Row, _Template, _Template | None]]:
        rows = []
        for number, row in enumerate(self._layout.rows):
            others = (row.other,) if isinstance(row.other, str) else row.other or ()
            official = self._compiled(row.official)
            rows += [
                (number, k, row, _Template(other, self._stride), official) for k, other in enumerate(others)
            ]
        return rows

    def merge(self, names: list[str]) -> dict[str, Step]:
        """From the other names to the official ones."""
        plan: dict[str, Step] = {}
        rank: dict[str, int] = {}  # the row that made a target: an earlier row wins over a later one
        parts: dict[str, dict[int, str]] = {}
        for name in names:
            for number, k, row, other, official in self._others:
                holes = other.find(name)
                if holes is None:
                    continue
                if official is None:
                    break
                target = official.fill(holes)
                if isinstance(row.other, tuple):
                    pieces = parts.setdefault(target, {})
                    pieces[k] = name
                    if len(pieces) == len(row.other):
                        plan[target] = Step(tuple(pieces[i] for i in range(len(pieces))))
                elif number <= rank.get(target, number):
                    plan[target], rank[target] = (
                        Step((name,), ones=row.ones, transposed=row.transposed),
                        number,
                    )
                break
            else:
                plan.setdefault(name, Step((name,)))
        return plan

    def split(self, names: list[str]) -> dict[str, Step]:
        """From the official names to the other ones."""
        plan: dict[str, Step] = {}
        rows = [(row, template) for row in self._layout.rows if (template := self._compiled(row.official))]
        for name in names:
            found = next(((row, holes) for row, t in rows if (holes := t.find(name)) is not None), None)
            if found is None:
                plan.setdefault(name, Step((name,)))
                continue
            row, holes = found
            others = (row.other,) if isinstance(row.other, str) else row.other or ()
            front, behind = row.ones
            for k, other in enumerate(others):
                plan[_Template(other, self._stride).fill(holes)] = Step(
                    (name,), (k, len(others)), (-front, -behind), row.transposed
                )
        return plan

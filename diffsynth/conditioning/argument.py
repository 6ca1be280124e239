"""One argument of ``pipe()``, declared once: as a field of the dataclass beside the code that reads it.

    motion_bucket_id: float | None = argument(
        None, help="How fast things move.", kind="number", unit="0 (slow) to 100 (fast)", group=SOURCE
    )

Signature, flags, help texts, the editors' stub, dataset columns, the README's tables and ``diffsynth schema``
are made from these fields. A field without `argument` is read there too, and declared by another dataclass.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

Kind: TypeAlias = Literal[
    "text", "whole", "number",
    "numbers",  # one, or a list of them; a flag gives one
    "switch",
    "pair",  # height and width
    "path",
    "picture", "pictures", "video",  # a flag and a cell of a table name files
    "object",  # of Python alone
]  # fmt: skip
# Whether it may differ from clip to clip of a dataset, as a column of its own, or is one thing for all.
Scope: TypeAlias = Literal["clip", "run"]
# Where its value is noted: what `pipe.last_settings` tells, what must be equal when a saved run goes on, what
# stands in the file of a video.
Record: TypeAlias = Literal["settings", "facts", "file"]
# What a video made of an earlier one does with the earlier one's value: take it, decide anew unless a flag
# says it, or decide it itself (there is no flag).
Refined: TypeAlias = Literal["kept", "anew", "decided"]

EVERYWHERE: tuple[Record, ...] = ("settings", "facts", "file")
MEDIA: tuple[Kind, ...] = ("picture", "pictures", "video")

# groups, as people see them; what has none is for Python alone
VIDEO, GUIDANCE, SOURCE, TILES = "The video", "Steps and guidance", "Start from a video", "VAE in tiles"
GROUPS = (VIDEO, GUIDANCE, SOURCE, TILES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """What there is to know of one argument."""

    name: str
    type: str  # as written in the source
    default: object  # None: the model's own, or nothing
    help: str  # `other` in backticks is another argument; the command writes its flag there
    kind: Kind
    scope: Scope = "run"
    unit: str = ""
    group: str | None = None
    choices: tuple[str, ...] = ()
    unread: str = ""  # what is said of it where the loaded model does not read it: which models do
    flags: tuple[str, ...] | None = None  # spellings; None: --the-name
    official: tuple[str, ...] = ()  # flags of Wan's own generate.py that mean it
    own_size: bool = False  # a picture of what is shown and of no frame: it keeps its size in a dataset
    records: tuple[Record, ...] = EVERYWHERE
    refined: Refined = "kept"


def argument(default: Any, *, help: str, kind: Kind, **more: Any) -> Any:
    """Declare an argument of ``pipe()`` as a field of a dataclass.

    Args:
        default: None leaves it to the model.
        help: one or two sentences for people; another argument stands in backticks.
        kind: what a value is.
        more: the other fields of `Argument`.

    Raises:
        TypeError, ValueError: for a key or a word that `Argument` does not know.
    """
    told = {"default": default, "help": help, "kind": kind, **more}
    made = Argument(name="", type="", **told)  # an unknown key or word fails where it is written
    words = {"kind": get_args(Kind), "scope": get_args(Scope), "refined": get_args(Refined),
             "group": (*GROUPS, None)}  # fmt: skip
    for key, known in words.items():
        if getattr(made, key) not in known:
            raise ValueError(f"{key} is {getattr(made, key)!r}; known: {', '.join(map(str, known))}.")
    return field(default=default, metadata={"argument": told})


def arguments_of(readers: Sequence[type]) -> Mapping[str, Argument]:
    """Return every argument that these dataclasses read by name, in the order in which they are declared.

    Raises:
        TypeError: for an argument that two of them declare, or that none does.
    """
    declared = declared_in(readers)
    if missing := [name for name in names_read(readers) if name not in declared]:
        raise TypeError(f"{', '.join(missing)}: read by an Inputs dataclass, and declared by none.")
    return MappingProxyType(declared)


def declared_in(readers: Sequence[type]) -> dict[str, Argument]:
    """Return the arguments that these dataclasses declare, by name.

    Raises:
        TypeError: for an argument that two of them declare.
    """
    declared: dict[str, Argument] = {}
    for reader in readers:
        for each in fields(reader):
            if (told := each.metadata.get("argument")) is None:
                continue
            if each.name in declared:
                raise TypeError(f"{each.name} is declared twice, the second time by {reader.__name__}.")
            declared[each.name] = Argument(name=each.name, type=str(each.type), **told)
    return declared


def names_read(readers: Sequence[type]) -> list[str]:
    """Return the names of all fields of these dataclasses, each once, in the order in which they are read."""
    return list(dict.fromkeys(each.name for reader in readers for each in fields(reader)))

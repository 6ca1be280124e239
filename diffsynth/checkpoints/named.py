"""Which file a name inside somebody's file means, and whether it may be opened.

Videos and saved steps tell what they were made with: "Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", "style.safetensors".
Whoever wrote the file chose these words. So they are names, looked for in folders that the user works in, and
never paths to follow: nothing absolute, no "..", no "~", no address, no link that leads out of such a folder.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffsynth.checkpoints.files import PART_FOLDERS, SUFFIXES
from diffsynth.checkpoints.hints import SHARD
from diffsynth.tiny import tiny_folder

logger = logging.getLogger("diffsynth")

TINY = "tiny:"  # in front of the name of a file that ships with this package
MODELS = "models"  # where downloads lie: models/ORGANISATION/REPOSITORY
MAX_FOLDERS = 1000  # of ``models`` that are looked into
_MAX_PARTS, _MAX_BYTES = 4, 255


def name_of(source: str | Path) -> str:
    """The name of a weights file for others: from its model's folder on, no path of this machine.

    Args:
        source: the file, with or without " (+5 shards)" behind it.
    """
    path = Path(str(source).partition(" (+")[0]).expanduser().absolute()
    if path.parent.resolve() == tiny_folder():
        return TINY + path.name
    return "/".join(path.parts[-3 if path.parent.name in PART_FOLDERS else -2 :])


def is_tiny(name: object) -> bool:
    """Whether a name means a file of the tiny Wan that ships with this package."""
    return isinstance(name, str) and name.startswith(TINY)


def places_for(told_by: Path, named: Iterable[Path] = ()) -> list[Path]:
    """Where the files that ``told_by`` names are looked for.

    Args:
        told_by: the file that holds the names.
        named: folders that the user has named.

    Returns:
        The working folder, the file's own, ``models`` and the folders in it, and what the user named.
    """
    models = Path(MODELS)
    inside: list[Path] = []
    if models.is_dir():
        inside = sorted(folder for folder in models.iterdir() if folder.is_dir() and not folder.is_symlink())
    return [Path(), told_by.parent, models, *inside[:MAX_FOLDERS], *named]


def find_named(name: object, places: Sequence[Path]) -> list[Path]:
    """Return the different files that a name means; each may be opened.

    Args:
        name: as a file tells it; anything at all.
        places: folders to look in.

    Returns:
        One path for each file, with its shards behind it not among them; empty when there is none.
    """
    if isinstance(name, str) and is_tiny(name):
        name, places = name.removeprefix(TINY), [tiny_folder()]
    parts = _parts(name)
    found: dict[Path, Path] = {}
    for place in places if parts else ():
        for count in range(len(parts)):
            # The place itself may be the model's folder: its name is then left out.
            if count and Path(os.path.realpath(place)).parts[-count:] != parts[:count]:
                continue
            candidate = place.joinpath(*parts[count:])
            real = _openable(candidate, place)
            if real is not None:
                found.setdefault(real, candidate)
    return list(found.values())


def with_shards(file: Path) -> list[Path]:
    """Return a file with the other shards of its model, of the same folder."""
    shard = SHARD.fullmatch(file.name)
    if shard is None:
        return [file]
    others = (SHARD.fullmatch(entry.name) for entry in sorted(file.parent.iterdir()))
    same = ("stem", "count", "rest")
    names = [o.string for o in others if o and all(o[group] == shard[group] for group in same)]
    return [file.with_name(name) for name in names if _openable(file.with_name(name), file.parent)]


def printable(text: object, length: int = 200) -> str:
    """Text of somebody's file as it may stand on a terminal: no control characters, cut where it is long."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(text)[: length + 1])
    return shown if len(shown) <= length else f"{shown[:length]} ..."


def _parts(name: object) -> tuple[str, ...]:
    """The folders and the file of a plain name of weights; empty for anything else."""
    if not isinstance(name, str) or not name.isprintable() or not name.endswith(SUFFIXES):
        return ()
    parts = tuple(name.split("/"))
    is_plain = all(
        part not in ("", ".", "..") and part[0] != "~" and not set(part) & set("\\:")
        and len(part.encode()) <= _MAX_BYTES
        for part in parts
    )  # fmt: skip
    return parts if is_plain and len(parts) <= _MAX_PARTS else ()


def _openable(file: Path, place: Path) -> Path | None:
    """The real path of an ordinary file that lies in a place, links followed; None for any other."""
    try:
        real = file.resolve(strict=True)
        is_ordinary = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError, ValueError):
        return None
    if not real.is_relative_to(place.resolve()):
        logger.warning("%s is a link that leads out of %s; it is not followed.", file, place.resolve())
        return None
    return real if is_ordinary else None

"""Names of what a command writes: defaults get the next number, a named file stays without --overwrite.

The names are claimed before the work starts, so that two commands at once never write to the same one.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from diffsynth.errors import ArgumentError, OutputPathError
from diffsynth.video.claims import Claim, claim
from diffsynth.video.paths import check_not_read, check_output_path, numbered, remove_leftovers

logger = logging.getLogger("diffsynth")


class Naming(Enum):
    """What becomes of a file that has the name already."""

    NUMBERED = "a default name: that file stays, and this run takes the next number"
    NEW = "a name that the user gave: an error"
    REPLACING = "a name that the user gave with --overwrite: that file is replaced"


def naming_of(*, is_named: bool, overwrite: bool) -> Naming:
    """Return the rule for a file whose name was given, or is a default."""
    return Naming.REPLACING if overwrite else Naming.NEW if is_named else Naming.NUMBERED


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """The names of a run that died; the run that goes on takes them over."""

    run_id: str
    paths: tuple[Path, ...]  # `Reserved.paths` of that run
    sheet: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What a command would like to write."""

    out: Path
    naming: Naming
    num_videos: int = 1  # several are NAME-1, NAME-2 ...
    has_sheet: bool = False
    inputs: Sequence[str | Path] = ()  # files, folders and patterns that it reads
    resumed: Resumed | None = None  # None: a new run

    def paths(self, number: int) -> tuple[Path, ...]:
        """The videos' names where the first ``number - 1`` sets of names are taken."""
        if self.resumed is not None:
            return tuple(numbered(path, number) for path in self.resumed.paths)
        out = numbered(self.out, number)
        if self.num_videos == 1:
            return (out,)
        return tuple(out.with_stem(f"{out.stem}-{i + 1}") for i in range(self.num_videos))

    def sheet(self, number: int) -> Path | None:
        """The name of the sheet beside them."""
        if self.resumed is not None:
            return None if self.resumed.sheet is None else numbered(self.resumed.sheet, number)
        return sheet_beside(numbered(self.out, number)) if self.has_sheet else None

    def every(self, number: int) -> tuple[Path, ...]:
        """All names of a set."""
        sheet = self.sheet(number)
        return self.paths(number) if sheet is None else (*self.paths(number), sheet)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """Names that are this run's until `release`, or until its process ends."""

    paths: tuple[Path, ...]  # one per video
    sheet: Path | None
    run_id: str  # 8 hex digits; what the run keeps beside its videos has them in its name
    overwrites: bool  # whether a file that has one of the names is replaced
    claims: tuple[Claim, ...]

    def release(self) -> None:
        """Give the names back."""
        for each in self.claims:
            each.release()


def sheet_beside(out: Path) -> Path:
    """``video.mp4`` -> ``video-sheet.png``."""
    return out.with_name(f"{out.stem}-sheet.png")


@contextmanager
def reserved(names: Names, suffixes: Sequence[str]) -> Iterator[Reserved]:
    """As `reserve`; the names are given back at the end."""
    found = reserve(names, suffixes)
    try:
        yield found
    finally:
        found.release()


def reserve(names: Names, suffixes: Sequence[str]) -> Reserved:
    """Claim the names for what a command writes, before its work starts.

    Args:
        names: what it would like to write.
        suffixes: extensions of videos that are fine here.

    Raises:
        OutputPathError: when a path cannot be written, is read by the same command, or is there already and
            neither a default nor to be replaced.
        ArgumentError: for a run that goes on in another process.
    """
    for path in names.paths(1):
        check_output_path(path, suffixes=suffixes)
    if sheet := names.sheet(1):
        check_output_path(sheet, suffixes=(".png",))
    if names.naming is not Naming.NUMBERED:
        for path in names.every(1):
            check_not_read(path, names.inputs)
    taken = [str(path) for path in names.every(1) if os.path.lexists(_real(path))]
    if taken and names.naming is Naming.NEW and names.resumed is None:
        are = "are" if len(taken) > 1 else "is"
        raise OutputPathError(
            f"{', '.join(taken)} {are} there already. Add --overwrite to replace "
            f"{'them' if len(taken) > 1 else 'it'}, or give another name."
        )
    for folder in {_real(path).parent for path in names.every(1)}:
        remove_leftovers(folder)
    run_id = secrets.token_hex(4) if names.resumed is None else names.resumed.run_id
    claims, number = None, 0
    while claims is None:
        number += 1
        overwrites = names.naming is Naming.REPLACING and number == 1
        claims = _claimed(names.every(number), run_id, overwrites=overwrites)
    if number > 1:
        _tell(names, number)
    return Reserved(
        paths=names.paths(number), sheet=names.sheet(number), run_id=run_id, overwrites=overwrites,
        claims=claims,
    )  # fmt: skip


def _claimed(paths: Iterable[Path], run_id: str, *, overwrites: bool) -> tuple[Claim, ...] | None:
    """Claims of all of these names; None when one of them is taken."""
    claims: list[Claim] = []
    for path in map(_real, paths):
        try:
            found = claim(path, run_id) if overwrites or not os.path.lexists(path) else ""
        except OSError as error:
            raise OutputPathError(f"{path} cannot be written: {error.strerror}.") from error
        if isinstance(found, Claim):
            claims.append(found)
        # Once more: a run that ended in between has given back the claim, and left its file.
        if isinstance(found, str) or (not overwrites and os.path.lexists(path)):
            for each in claims:
                each.release()
            if found == run_id:
                raise ArgumentError(f"Run {run_id} goes on already, in another process; wait for its end.")
            return None
    return tuple(claims)


def _tell(names: Names, number: int) -> None:
    """Say which names are taken instead; a file that the user named and does not get is worth a warning."""
    wanted, given = (" ".join(map(str, names.paths(n)[:1])) for n in (1, number))
    level = logging.INFO if names.naming is Naming.NUMBERED else logging.WARNING
    logger.log(level, "%s is there already, or another run is writing it; this one writes %s.", wanted, given)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))

"""Output paths: found good before the work starts, written under another name, named when they are whole."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from itertools import count
from pathlib import Path

from diffsynth.errors import OutputPathError
from diffsynth.portable import is_alive
from diffsynth.video import claims
from diffsynth.video.processes import has_ended, process_tag

logger = logging.getLogger("diffsynth")

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_NO_ROOM = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


def user_cache() -> Path:
    """The folder of this user for what may be lost.

    Raises:
        RuntimeError: for a user without a home.
    """
    cache = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "diffsynth"


def check_output_path(
    path: str | os.PathLike[str],
    *,
    need_bytes: int = 0,
    suffixes: Sequence[str] = VIDEO_SUFFIXES + IMAGE_SUFFIXES,
) -> Path:
    """Make sure that ``path`` can be written, so that no work is lost at its end.

    A missing folder is created. A file already there is left as it is until it is replaced.

    Args:
        path: the file to be written.
        need_bytes: estimated size of that file in bytes; 0 leaves the free space unchecked.
        suffixes: extensions that are fine here, with their dots, in lower case.

    Returns:
        The real path (links followed).

    Raises:
        OutputPathError: when the path is a folder, has an unknown extension, lies in a folder that can
            neither be found nor created nor written, or on a disk with less than ``need_bytes`` left.
    """
    target = Path(os.path.realpath(os.path.expanduser(os.fspath(path))))
    suffix = target.suffix.lower()
    if os.path.isdir(target):
        raise OutputPathError(f"{path} is a folder; give the name of a file, such as {target / 'video.mp4'}.")
    if suffix not in suffixes:
        has = f"the extension {suffix!r}" if suffix else "no extension"
        raise OutputPathError(f"{path} has {has}, which tells no known format; use {', '.join(suffixes)}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            target.lstat()  # a name that is too long for the disk fails here
        probe = temporary_beside(target)
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:
        raise OutputPathError(
            f"{path} cannot be written: {_reason(error)}. Choose a folder that you may write to."
        ) from error
    check_room(target, need_bytes)
    return target


def check_room(target: Path, need_bytes: int) -> None:
    """Make sure that the disk of an existing folder has so many bytes left for a file.

    Raises:
        OutputPathError: when it has less.
    """
    free = shutil.disk_usage(target.parent).free
    if free < need_bytes:
        raise OutputPathError(
            f"{target} needs about {_mib(need_bytes)}, but only {_mib(free)} are free in {target.parent}. "
            "Free some space or choose another disk."
        )


def check_not_read(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Make sure that a file to be written is none that is read: by what it is, not by its name.

    Args:
        path: the file to be written; whatever is not there yet is fine.
        inputs: files, folders (all files in them) and patterns that are read.

    Raises:
        OutputPathError: when one of them is the same file, by whatever link.
    """
    target = Path(os.path.expanduser(os.fspath(path)))
    try:
        written = target.stat()
    except OSError:
        return
    for given in inputs:
        for file in _files_in(os.path.expanduser(os.fspath(given))):
            if _is_file(written, file):
                raise OutputPathError(
                    f"{path} is the same file as {file}, which is read here; writing it would destroy the "
                    "source. Give another name."
                )


def _is_file(written: os.stat_result, path: str) -> bool:
    try:
        return os.path.samestat(written, os.stat(path))
    except OSError:  # a link that leads nowhere
        return False


def _files_in(place: str) -> Iterator[str]:
    for found in [place] if os.path.exists(place) else glob(place):
        if os.path.isdir(found):
            for folder, _, names in os.walk(found):
                yield from (os.path.join(folder, name) for name in names)
        else:
            yield found


def numbered(path: Path, number: int) -> Path:
    """``video.mp4`` -> ``video_2.mp4``; 1 is the name itself. ``video-2.mp4`` is the second of one run."""
    return path if number == 1 else path.with_stem(f"{path.stem}_{number}")


def temporary_beside(target: Path) -> Path:
    """A new name in the folder of ``target``, with its extension, that tells its process."""
    return target.with_name(f".part-{process_tag()}-{secrets.token_hex(4)}{target.suffix.lower()}")


_TEMPORARY = re.compile(r"\.part-(?P<number>\d+)(?:-(?P<mark>[0-9a-f]{12}))?-[0-9a-f]{8}(?:\.\w+)?")
_looked_into: dict[Path, float] = {}
_OLD_S = 86_400.0  # of another machine, which may be alive: nothing is written so slowly


def remove_leftovers(folder: Path, *, pause_s: float = 0.0) -> None:
    """Remove what dead processes left in a folder: half-written files, and names that they had claimed.

    Args:
        folder: it may be missing.
        pause_s: nothing is done so soon after the last time that this process looked into it.
    """
    now = time.monotonic()
    if pause_s and now - _looked_into.get(folder, -pause_s) < pause_s:
        return
    if pause_s:
        _looked_into[folder] = now
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(claims.PREFIX):
                claims.remove_if_dead(Path(entry.path))
            elif (found := _TEMPORARY.fullmatch(entry.name)) and _is_leftover(entry, found):
                with suppress(OSError):
                    os.unlink(entry.path)


def _is_leftover(entry: os.DirEntry[str], found: re.Match[str]) -> bool:
    number, mark = found["number"], found["mark"]
    is_dead = has_ended(f"{number}-{mark}") if mark else not is_alive(int(number)) or None
    if is_dead is None:
        with suppress(OSError):
            return time.time() - entry.stat().st_mtime > _OLD_S
    return is_dead is True


def why_not_writable(folder: Path) -> str:
    """Why no file can be made in a folder that is there, in the system's words; "" where one can."""
    probe = temporary_beside(folder / "probe")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return _reason(error)
    return ""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``target`` at the end, or vanishes on any exception.

    Raises:
        OutputPathError: when the disk refuses what is written.
    """
    temporary = temporary_beside(target)
    try:
        with disk_errors(target):
            yield temporary
            os.replace(temporary, target)
    finally:
        with suppress(OSError):  # a read-only disk refuses even to remove what is not there
            temporary.unlink()


def write_whole(target: Path, write: Callable[[Path], object], *, overwrite: bool = True) -> Path:
    """Let ``write`` make a file under a temporary name, then give it its own; return the path that it got.

    Args:
        target: the name.
        write: is given the temporary path.
        overwrite: whether a file of this name is replaced; else the new one gets the next number.

    Raises:
        OutputPathError: when the disk refuses what is written; nothing half-written stays.
    """
    temporary = temporary_beside(target)
    try:
        with disk_errors(target):
            write(temporary)
            return publish(temporary, target, overwrite=overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, target: Path, *, overwrite: bool) -> Path:
    """Give a complete file its name, or, where that is taken and must stay, the next number; return it.

    Raises:
        OSError: when the disk refuses.
    """
    if overwrite:
        os.replace(temporary, target)
        return target
    for number in count(1):
        place = numbered(target, number)
        with suppress(FileExistsError):
            _move_to_new(temporary, place)
            break
    if place != target:
        logger.warning("%s was taken meanwhile; this one is %s", target, place)
    return place


def _move_to_new(temporary: Path, place: Path) -> None:
    """Rename a file; a name that is there is an error, also if it came this very moment."""
    try:
        os.link(temporary, place)  # one step, other than to look and then to rename
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # a disk or a system without hard links
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, place)
    else:
        temporary.unlink()


@contextmanager
def disk_errors(target: Path, done: str = "") -> Iterator[None]:
    """Turn an ``OSError`` met while writing ``target`` into an OutputPathError that says what to do."""
    try:
        yield
    except OutputPathError:
        raise
    except OSError as error:
        full = error.errno in _NO_ROOM
        free = _mib(shutil.disk_usage(target.parent).free) if target.parent.is_dir() else "none"
        advice = f"{free} are free there; free some space" if full else "Check the disk"
        raise OutputPathError(
            f"Writing {target} failed{done}: {_reason(error)}. Nothing half-written was left behind. "
            f"{advice}, or choose another folder, and save again."
        ) from error


def _reason(error: Exception) -> str:
    """What the system said, without the temporary name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def told_size(num_bytes: int) -> str:
    """An amount in the largest unit of which there is one."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((unit for unit, size in units.items() if num_bytes >= size), "KiB")
    return f"{num_bytes / units[unit]:.{2 if unit == 'GiB' else 1}f} {unit}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"

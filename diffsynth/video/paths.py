"""Output paths: found good before the work starts, replaced in one step when it ends."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from diffsynth.errors import OutputPathError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_NO_ROOM = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


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
    free = shutil.disk_usage(target.parent).free
    if free < need_bytes:
        raise OutputPathError(
            f"{path} needs about {_mib(need_bytes)}, but only {_mib(free)} are free in {target.parent}. "
            "Free some space or choose another disk."
        )
    return target


def temporary_beside(target: Path) -> Path:
    """A new name in the folder of ``target``, with its extension, that no other process uses."""
    return target.with_name(f".part-{os.getpid()}-{secrets.token_hex(4)}{target.suffix.lower()}")


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


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"

"""Names that a running command has claimed for what it will write: no two commands have the same one.

A claim is a hidden file beside the name, locked while its process lives. The system takes the lock from a
process that dies, however it dies, so that its names are free again at once. Where there are no locks (a
system without them, some network disks), the file tells which process has it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffsynth.portable import try_lock
from diffsynth.video.processes import has_ended, process_tag

PREFIX = ".claim-"
NAME_BYTES = 255  # the longest name that usual disks take
_PATIENCE_S = 1.0  # whoever looks whether a claim is alive holds its lock for a moment


@dataclass(frozen=True, slots=True)
class Claim:
    """One name that belongs to this process until `release`, or until the process ends."""

    target: Path
    run_id: str
    descriptor: int

    def release(self) -> None:
        """Give the name back."""
        _remove(self.descriptor, claim_file(self.target))


def claim(target: Path, run_id: str) -> Claim | str:
    """Claim a name in an existing folder that can be written.

    Args:
        target: the name, links followed.
        run_id: of the run that will write it.

    Returns:
        The claim; or, when a command that still runs has the name, the id of its run ("": it is not told).

    Raises:
        OSError: when the disk refuses.
    """
    file, deadline = claim_file(target), time.monotonic() + _PATIENCE_S
    while True:
        with suppress(FileNotFoundError):  # given back while it was opened
            descriptor, is_new = _opened(file)
            tag, owner = _owner(descriptor)
            is_free = try_lock(descriptor)
            if is_free is None:
                is_free = is_new or has_ended(tag) is True
            if is_free and _is_there(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"{process_tag()} {run_id}".encode())
                return Claim(target, run_id, descriptor)
            os.close(descriptor)
            if has_ended(tag) is False or time.monotonic() > deadline:
                return owner
        time.sleep(0.02)


def remove_if_dead(file: Path) -> None:
    """Remove a claim whose process has ended."""
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDWR)
        is_free = try_lock(descriptor)
        if is_free is None:
            is_free = has_ended(_owner(descriptor)[0]) is True
        if is_free:
            _remove(descriptor, file)
        else:
            os.close(descriptor)


def claim_file(target: Path) -> Path:
    """``video.mp4`` -> ``.claim-video.mp4`` in the same folder."""
    return target.with_name(PREFIX + fitting(target.name, NAME_BYTES - len(PREFIX)))


def fitting(name: str, num_bytes: int) -> str:
    """The end of a name that is too long: there numbers stand."""
    return (
        os.fsencode(name)[-num_bytes:].decode(errors="ignore") if len(os.fsencode(name)) > num_bytes else name
    )


def _opened(file: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file was made now."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(file, os.O_RDWR), False


def _owner(descriptor: int) -> tuple[str, str]:
    """Tag of the process and id of the run; empty while the file is being made."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    tag, _, run_id = os.read(descriptor, 200).decode("ascii", "replace").partition(" ")
    return tag, run_id


def _is_there(descriptor: int, file: Path) -> bool:
    """Whether the name still stands for the opened file."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _remove(descriptor: int, file: Path) -> None:
    """Remove a claim of ours, and close it."""
    is_open = True
    with suppress(OSError):
        if _is_there(descriptor, file):
            try:
                file.unlink()  # under the lock: whoever gets that next sees that the file is gone
            except PermissionError:  # a system where an open file cannot be removed
                os.close(descriptor)
                is_open = False
                file.unlink()
    if is_open:
        with suppress(OSError):
            os.close(descriptor)

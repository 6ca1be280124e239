"""Which process wrote a file, and whether it has ended: told by its number and the time of its start.

A number alone is given to later processes again, and a process of another machine has a number of its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache

from diffsynth.portable import start_of


def process_tag() -> str:
    """Return ``NUMBER-MACHINESTART`` of this process, such as ``4711-1a2b3c4d5e6f``."""
    return _tag_of(os.getpid())


def has_ended(tag: str) -> bool | None:
    """Whether a process has ended, by its `process_tag`; None: it ran on another machine, or nobody knows."""
    number, _, mark = tag.partition("-")
    if not number.isdecimal() or not mark.startswith(_hash(_machine(), 4)):
        return None
    start = start_of(int(number))
    return None if start == "" else start is None or mark != _mark(start)


@cache  # by number: a forked child has another
def _tag_of(number: int) -> str:
    return f"{number}-{_mark(start_of(number) or '')}"


def _mark(start: str) -> str:
    return _hash(_machine(), 4) + _hash(start, 8)


def _hash(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:length]


@cache
def _machine() -> str:
    """The name of this machine, and of the container, whose processes have numbers of their own."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()} {space}"

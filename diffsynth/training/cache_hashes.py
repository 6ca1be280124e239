"""Hashes of media files, remembered beside them, so that a file is read again only when it has changed.

The index is a JSON file per folder and process: name -> size, time of change, hash. It only spares reading:
without it, or with a damaged one, files are hashed anew.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from diffsynth.errors import OutputPathError
from diffsynth.video.paths import replacing

logger = logging.getLogger("diffsynth")

INDEX = ".diffsynth-hashes"
DIGEST_BYTES = 16
READ_BYTES = 1 << 22


class FileHashes:
    """Content hashes (32 hex digits) of files.

    Args:
        folder: where the index lies; None: one in each file's own folder.
        rank: of this process, which writes an index of its own and reads those of all.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._known: dict[Path, dict[str, list[object]]] = {}  # index folder -> name -> size, mtime, hash
        self._changed: set[Path] = set()
        self._refused: set[Path] = set()  # folders that cannot be written, told once
        self._lock = threading.Lock()

    def digest(self, path: Path) -> str:
        """The hash of one file.

        Raises:
            OSError: when it cannot be read.
        """
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        folder, name = self._place(path)
        with self._lock:
            known = self._index(folder).get(name)
        if known is not None and known[:2] == stamp:
            return str(known[2])
        digest = content_hash(path)
        with self._lock:
            self._known[folder][name] = [*stamp, digest]
            self._changed.add(folder)
        return digest

    def learn(self, paths: Iterable[Path], workers: int, on_file: Callable[[Path], object]) -> None:
        """Hash files in threads, ahead of `digest`; one that cannot be read is left for `digest` to raise."""

        def one(path: Path) -> Path:
            with suppress(OSError):
                self.digest(path)
            return path

        try:
            with ThreadPoolExecutor(workers) as pool:
                for path in pool.map(one, paths):
                    on_file(path)
        finally:
            self.save()

    def save(self) -> None:
        """Write what is new; folders that cannot be written only cost time on the next run."""
        refused: list[OutputPathError] = []
        for folder in sorted(self._changed - self._refused):
            target = folder / f"{INDEX}-{self._rank}.json"
            try:
                with replacing(target) as temporary:
                    temporary.write_text(json.dumps(self._known[folder]), encoding="utf-8")
            except OutputPathError as error:
                refused.append(error)
                self._refused.add(folder)
        if refused:
            logger.warning(
                "Hashes of files in %d folders are not kept, the next run reads them anew. The first: %s",
                len(refused), refused[0],
            )  # fmt: skip
        self._changed.clear()

    def _place(self, path: Path) -> tuple[Path, str]:
        if self._folder is None:
            return path.parent, path.name
        return self._folder, str(path.absolute())

    def _index(self, folder: Path) -> dict[str, list[object]]:
        if folder not in self._known:
            found: dict[str, list[object]] = {}
            for file in sorted(folder.glob(f"{INDEX}-*.json")):
                found.update(_entries(file))
            self._known[folder] = found
        return self._known[folder]


def content_hash(path: Path) -> str:
    """The hash of a file's bytes."""
    told = blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            told.update(piece)
    return told.hexdigest()


def short_hash(parts: Sequence[str], digest_bytes: int = 8) -> str:
    """The hash of some texts, hex digits."""
    told = blake2b(digest_size=digest_bytes)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        told.update(len(data).to_bytes(8, "little") + data)
    return told.hexdigest()


def _entries(file: Path) -> dict[str, list[object]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)
    }

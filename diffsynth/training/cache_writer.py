"""Reading ahead and writing behind, so that decoding, coding and the disk work at the same time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from diffsynth.errors import DiffSynthError, NotFiniteError
from diffsynth.portable import is_alive
from diffsynth.training.samples import EncodedSample

Job = TypeVar("Job")
Result = TypeVar("Result")

# What a damaged file makes decoders raise; anything else is a fault of the program.
UNREADABLE = (DiffSynthError, OSError, ValueError, EOFError)
FRESH_S = 300  # a temporary file of another machine that is younger may still be written to
OLD_S = 86_400


class ReadAhead(Generic[Job, Result]):
    """Results of jobs in their order, computed by threads a few jobs ahead.

    Args:
        jobs: what is to be done.
        read: does it.
        workers: threads.
    """

    def __init__(self, jobs: Iterable[Job], read: Callable[[Job], Result], workers: int) -> None:
        self._jobs, self._read, self._workers = jobs, read, workers

    def run(self) -> Generator[tuple[Job, Result | Exception], None, None]:
        """Yield each job with its result, or with what its file made the decoder raise."""
        waiting: deque[tuple[Job, Future[Result | Exception]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            for job in self._jobs:
                waiting.append((job, pool.submit(self._outcome, job)))
                # One more per worker than are worked on: nobody waits, and RAM stays bounded.
                if len(waiting) >= 2 * self._workers:
                    yield self._oldest(waiting)
            while waiting:
                yield self._oldest(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _outcome(self, job: Job) -> Result | Exception:
        try:
            return self._read(job)
        except UNREADABLE as error:
            return error

    @staticmethod
    def _oldest(waiting: deque[tuple[Job, Future[Result | Exception]]]) -> tuple[Job, Result | Exception]:
        job, future = waiting.popleft()
        return job, future.result()


class SampleWriter(Generic[Job]):
    """Writes samples in threads; leaving it waits for those that are under way.

    Args:
        workers: threads.
        on_end: told each job, and the bytes of its file or why its sample cannot be used.
    """

    def __init__(self, workers: int, on_end: Callable[[Job, int | NotFiniteError], object]) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="write")
        self._limit, self._on_end = 2 * workers, on_end
        self._waiting: deque[tuple[Job, Future[int | NotFiniteError]]] = deque()

    def put(self, job: Job, sample: EncodedSample, path: Path) -> None:
        """Write a sample some time soon.

        Raises:
            OutputPathError: when the disk refused one of those before.
        """
        while len(self._waiting) >= self._limit:
            self._collect()
        self._waiting.append((job, self._pool.submit(_write, sample, path)))

    def flush(self) -> None:
        """Wait for everything that was put; raises as `put`."""
        while self._waiting:
            self._collect()

    def _collect(self) -> None:
        job, future = self._waiting.popleft()
        self._on_end(job, future.result())

    def __enter__(self) -> SampleWriter[Job]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _write(sample: EncodedSample, path: Path) -> int | NotFiniteError:
    if not bool(sample.latents.isfinite().all()):
        return NotFiniteError(
            "the VAE gave NaN or infinity; load it in float32 or bfloat16 if it is in float16"
        )
    sample.save(path)
    return path.stat().st_size


def remove_leftovers(folders: Iterable[Path], world: int) -> list[Path]:
    """Remove temporary files of processes that were killed while writing, and return them.

    Args:
        folders: where samples lie.
        world: processes at work, perhaps on several machines that share these folders.
    """
    removed = []
    for folder in dict.fromkeys(folders):
        for file in sorted(folder.glob(".part-*.safetensors")):
            try:
                age_s = time.time() - file.stat().st_mtime
                process = int(file.name.split("-")[1])
                is_dead = not is_alive(process) and (world == 1 or age_s > FRESH_S)
                if is_dead or age_s > OLD_S:
                    file.unlink()
                    removed.append(file)
            except (OSError, ValueError, IndexError):  # gone meanwhile, or not ours
                continue
    return removed

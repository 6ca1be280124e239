"""Which frames of a video become clips: the rate is changed first, then windows are laid over the rest."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b

from diffsynth.training.dataset.config import ClipPolicy
from diffsynth.video.probing import MediaFacts

SAME_RATE = 2e-3  # share by which one rate differs: 23.976 and 24, 29.97 and 30
_ROUNDING = 1e-6  # of frame numbers, so that the last frame is not lost to the last bit of a division


def resampled(facts: MediaFacts, fps: float | None) -> tuple[int, ...]:
    """Return the frame of the file that each frame at ``fps`` shows: the nearest in time.

    Args:
        facts: of the file.
        fps: frames per second of the result; None takes every frame.

    Returns:
        Frame numbers, not falling. A rate above the file's repeats frames.
    """
    every = tuple(range(facts.num_frames))
    if fps is None or facts.fps is None or facts.num_frames == 1:
        return every
    if facts.times_s is not None:
        return _by_time(facts.times_s, fps)
    if abs(facts.fps - fps) <= SAME_RATE * fps:
        return every
    step = facts.fps / fps  # frames of the file per frame of the result
    count = math.floor((facts.num_frames - 1) / step + _ROUNDING) + 1
    return tuple(min(math.floor(number * step + 0.5), facts.num_frames - 1) for number in range(count))


def _by_time(times_s: Sequence[float], fps: float) -> tuple[int, ...]:
    count = math.floor(times_s[-1] * fps + _ROUNDING) + 1
    return tuple(nearest_in_time(times_s, number / fps) for number in range(count))


def nearest_in_time(times_s: Sequence[float], time_s: float) -> int:
    """The number of the frame that is shown nearest to a time."""
    after = bisect_left(times_s, time_s)
    if after == 0:
        return 0
    if after == len(times_s):
        return after - 1
    return after if times_s[after] - time_s < time_s - times_s[after - 1] else after - 1


def longest(length: int, buckets: Sequence[int]) -> int | None:
    """The longest bucket that a video of ``length`` frames fills; None when it fills none."""
    return max((count for count in buckets if count <= length), default=None)


def starts(length: int, count: int, policy: ClipPolicy, *, windows: int, seed: int, name: str) -> list[int]:
    """Return the first frames of the clips of one video, rising, each once.

    Args:
        length: frames of the video, at least ``count``.
        count: frames of a clip.
        policy: see ``DatasetConfig.clip``.
        windows: how many, see ``DatasetConfig.windows``.
        seed: of random starts.
        name: of the file, which also decides random starts: the same file gives the same clips in every run.
    """
    room = length - count
    if policy == "first":
        return [0]
    if policy == "middle":
        return [room // 2]
    if policy == "random":
        drawn = (share(f"{seed}/{name}/{number}") for number in range(windows))
        return sorted({math.floor(part * (room + 1)) for part in drawn})
    if policy == "uniform":
        if windows == 1:
            return [room // 2]
        return sorted({round(room * number / (windows - 1)) for number in range(windows)})
    end_to_end = list(range(0, room + 1, count))
    return end_to_end[:windows] if windows else end_to_end


def share(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, evenly spread over texts."""
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48

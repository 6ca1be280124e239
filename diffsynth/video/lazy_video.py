"""A video whose frames are made while they are read, so that memory does not grow with its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LazyVideo:
    """Stands for a tensor (1, C, F, H, W) where frames are taken in order, a few at a time."""

    shape: tuple[int, int, int, int, int]
    read: Callable[[], Iterator[Tensor]]  # frames (1, C, 1, H, W), all F; each call begins again

    def chunks(self, lengths: Sequence[int]) -> Iterator[Tensor]:
        """Read once, so many frames at a time: (1, C, length, H, W) each."""
        frames = self.read()
        for length in lengths:
            yield _joined(islice(frames, length), length)
        next(frames, None)  # to its end, where a reader may have something to say

    def whole(self) -> Tensor:
        """The tensor."""
        return _joined(self.read(), self.shape[2])


def _joined(frames: Iterator[Tensor], length: int) -> Tensor:
    """So many frames as one tensor; of the others one is there at a time."""
    first = next(frames)
    joined = first.new_empty(*first.shape[:2], length, *first.shape[3:])
    for index, frame in enumerate(chain([first], frames)):
        joined[:, :, index : index + 1] = frame
    return joined

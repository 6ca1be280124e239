"""Runs that end before their last step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def stopping_before(step: int) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A ``progress_bar_cmd`` that lets so many steps be made and then presses Ctrl-C."""

    def walk(steps: Iterable[Any]) -> Iterator[Any]:
        for index, told in enumerate(steps):
            if index == step:
                raise KeyboardInterrupt
            yield told

    return walk

"""Counts calls of real modules, through hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def calls_of(*modules: nn.Module | None) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of each call, in order."""
    seen: list[tuple[Any, ...]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        for module in modules
        if module is not None
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

"""Names that a module gives out and that live elsewhere: each is loaded when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    module: str, homes: Mapping[str, str], missing: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a module.

    Args:
        module: its name.
        homes: the module in which each name lives.
        missing: names that scripts import from here and that do not exist, or how such names begin, and the
            sentence that says so. It comes as an ImportError: of an AttributeError Python would show
            "cannot import name" alone.
    """

    def find(name: str) -> object:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        for start, sentence in (missing or {}).items():
            if name.startswith(start) and not name.startswith("__"):
                raise ImportError(f"{module} has no {name}: {sentence}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find

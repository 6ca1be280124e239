"""Which of several DiTs is meant, and which of two is which expert: told by headers and paths.

A plan, a pipeline, its LoRAs and training ask here, so that they all say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffsynth.checkpoints.architecture import Match
from diffsynth.checkpoints.hints import Role

DIT, LOW = "dit", "_low_noise"  # a part of a pipeline, and what stands behind it for the low-noise expert


def is_dit(match: Match) -> bool:
    """Whether a network is a diffusion transformer."""
    return match.architecture.part == DIT


def is_named(match: Match, path: str | Path) -> bool:
    """Whether a path is one of a network's files, or a folder that holds one."""
    wanted = Path(path).expanduser().resolve()
    files = [file.resolve() for file in match.checkpoint.paths]
    return any(wanted == file or wanted in file.parents for file in files)


def roles_of(dits: Sequence[Match]) -> tuple[Role, Role] | None:
    """Return which expert each of two DiTs is: as their files or paths say, else by their order.

    Returns:
        None where both say the same of themselves.
    """
    first, second = dits
    if first.role is not None and first.role == second.role:
        return None
    return ("low", "high") if first.role == "low" or second.role == "high" else ("high", "low")


def tells_roles(dits: Iterable[Match]) -> bool:
    """Whether a file or path says which expert one of them is."""
    return any(dit.role is not None for dit in dits)

"""LoRAs of two experts: files that come in pairs, and what their arguments mean."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffsynth.checkpoints.hints import Role, role_mark, role_of
from diffsynth.checkpoints.pairs import is_dit, roles_of
from diffsynth.errors import ArgumentError, LoRAError

if TYPE_CHECKING:
    from torch import nn

    from diffsynth.models.model_manager import LoadedModel

logger = logging.getLogger("diffsynth")

Expert = Literal["high", "low", "both"]
PerExpert = Mapping[Role, float]
OTHER = {"high": "low", "HIGH": "LOW", "High": "Low", "low": "high", "LOW": "HIGH", "Low": "High"}
SEPARATORS = "_-. "


def common_name(stem: str) -> str:
    """What the names of a pair have in common: without the word that tells the expert.

    >>> common_name("style_high_noise")
    'style'
    """
    mark = role_mark(stem)
    if mark is None:
        return stem
    before, after = stem[: mark.start()].rstrip(SEPARATORS), stem[mark.end() :].lstrip(SEPARATORS)
    return "_".join(part for part in (before, after) if part) or stem


def twin_of(path: Path) -> Path | None:
    """The file of the other expert: the same name with the other word, in the file or else in its folder.

    None for a path that names no expert. The file need not be there.
    """
    for part, rest in ((path.name, path.parent), (path.parent.name, path.parent.parent)):
        mark = role_mark(part)
        if mark is not None:
            word = mark["role"]
            other = OTHER.get(word) or OTHER[word.lower()]
            found = rest / f"{part[: mark.start()]}{other}{part[mark.start() + len(word) :]}"
            return found if part is path.name else found / path.name
    return None


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """The two files that have this name in common, high noise first; None unless there is one of each.

    Args:
        path: of no file: what the names of both have in common, such as ``loras/style.safetensors``.
    """
    found: dict[Role, list[Path]] = {"high": [], "low": []}
    for file in sorted(path.parent.glob(f"*{path.suffix or '.safetensors'}")):
        role = role_of((file,), {}) if role_mark(file.stem) else None
        if role is not None and common_name(file.stem) == path.name.removesuffix(".safetensors"):
            found[role].append(file)
    if len(found["high"]) != 1 or len(found["low"]) != 1:
        return None
    return found["high"][0], found["low"][0]


@dataclass(frozen=True)
class Aim:
    """Where a LoRA is to go: None leaves it to the file."""

    network: str | None
    role: Role | None
    module: nn.Module | None = None  # this one network


def role_of_arguments(network: str | None, expert: Expert | None) -> Role | None:
    """The one expert that ``network=`` or ``expert=`` names; None for both, or when neither was given."""
    if expert not in (None, "high", "low", "both"):
        raise ArgumentError(f"expert is {expert!r}; give 'high', 'low' or 'both'.")
    if expert is not None and network in ("high", "low"):
        raise ArgumentError(f"expert={expert!r} and network={network!r} say the same; give expert= alone.")
    role = network if network in ("high", "low") else expert
    return None if role not in ("high", "low") else role  # type: ignore[return-value]


def files_of(path: Path, expert: Expert | None) -> list[Path]:
    """A file; or the two of a pair, asked for by what their names have in common or by one of them."""
    if not path.exists() and expert in (None, "both"):
        return list(pair_of(path) or [path])
    twin = twin_of(path) if expert == "both" else None
    if twin is None:
        return [path]
    if not twin.exists():
        raise LoRAError(
            f"expert='both' loads {path.name} for its own expert and {twin.name} for the other, and {twin} "
            "is not there. Fetch it, or load the one file: leave expert= out."
        )
    return [path, twin] if role_of((path,), {}) == "high" else [twin, path]


def tell_of_twins(paths: Sequence[Path], loaded: Container[str]) -> None:
    """Log which other halves of pairs lie there and were not asked for."""
    for path in paths:
        twin = twin_of(path)
        if twin is not None and twin.exists() and twin not in paths and twin.stem not in loaded:
            logger.info(
                "%s is for one expert; %s, beside it, is not loaded. expert='both' loads the pair.",
                path.name, twin.name,
            )  # fmt: skip


def strength_for(value: float | PerExpert, role: Role | None, path: Path) -> float:
    """What ``lora_alpha`` is for this file."""
    if not isinstance(value, Mapping):
        return number(value, "lora_alpha")
    if role is None or role not in value:
        raise ArgumentError(
            f"lora_alpha is {dict(value)!r}, and {path.name} is for "
            f"{'no one expert' if role is None else f'the {role}-noise expert'}; give a number, or "
            "{'high': 1.0, 'low': 1.0} for a pair of files."
        )
    return number(value[role], "lora_alpha")


def number(value: object, argument: str) -> float:
    """A strength, checked."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1000 < value < 1000:
        raise ArgumentError(f"{argument} is {value!r}; give a strength such as 1.0 (as trained) or 0.8.")
    return float(value)


def role_by_path(entry: LoadedModel, entries: Sequence[LoadedModel]) -> Role | None:
    """Which expert a network belongs to; by order of loading where no path tells. None: to the only one."""
    dits = [one for one in entries if is_dit(one.match)]
    if len(dits) != 2 or entry not in dits or entry.match.role is not None:
        return entry.match.role
    roles = roles_of([one.match for one in dits])
    assert roles is not None  # this one says nothing of itself
    return roles[dits.index(entry)]

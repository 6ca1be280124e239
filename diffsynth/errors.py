"""Every error a user can cause: what happened (with the value), what was expected, what to do.

All derive from `DiffSynthError`. Those that mean "a wrong argument" also derive from `ValueError`,
those about files from `OSError` or `FileNotFoundError`, so that ordinary ``except`` clauses catch them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def absence(path: object) -> str:
    """Why there is no file of this name: it does not exist, or it is an address."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        return "is an address, and nothing is read from addresses: download it first"
    return "does not exist"


class DiffSynthError(Exception):
    """Base of every error raised on purpose by this package."""


class ArgumentError(DiffSynthError, ValueError):
    """An argument has a value that cannot work."""


class ResumeError(ArgumentError):
    """Saved steps that are of another run than the one that is to go on from them."""

    def __init__(self, path: object, differences: Sequence[str]) -> None:
        super().__init__(
            f"{path} is of another run: {'; '.join(differences)}. Give what that run had, or begin anew "
            "without resume_from=."
        )
        self.path, self.differences = path, tuple(differences)


class UnknownArgumentError(DiffSynthError, TypeError):
    """An argument that nothing reads; the message holds the nearest name."""

    def __init__(self, name: str, known: Iterable[str], where: str = "pipe()") -> None:
        names = sorted(known)
        nearest = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known arguments: {', '.join(names)}."
        super().__init__(f"{where} has no argument {name!r}. {hint}")
        self.name, self.nearest = name, nearest[0] if nearest else None


class UnusedInputError(DiffSynthError, ValueError):
    """An input that the loaded models cannot use."""


class MissingModelError(DiffSynthError, RuntimeError):
    """A network that this call needs is not loaded."""


class AmbiguousModelError(DiffSynthError, ValueError):
    """More networks of one kind than a pipeline can use, or two that do not belong together."""


class TokenizerNotFoundError(DiffSynthError, FileNotFoundError):
    """A text encoder without its tokenizer; says where it was looked for."""

    def __init__(self, looked_at: Sequence[str]) -> None:
        places = (
            "\n  ".join(looked_at) if looked_at else "nowhere: the text encoder was not loaded from a file"
        )
        super().__init__(
            f"The text encoder needs its tokenizer (spiece.model or tokenizer.json). Looked at:\n  {places}\n"
            "Copy the model's google/umt5-xxl folder beside the text encoder, or pass tokenizer_path=FOLDER."
        )


class NotFiniteError(DiffSynthError, ArithmeticError):
    """NaN or infinity in the latents while sampling."""


class OutputPathError(DiffSynthError, OSError):
    """An output path that cannot be written, found before the work starts."""


class CheckpointError(DiffSynthError):
    """A weights file that cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A path that does not exist, or a glob or folder that holds no weights."""


class MissingShardError(CheckpointError, FileNotFoundError):
    """One or more shards of a split model are missing; the message names them."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """A file that is truncated, or whose header does not agree with its size."""


class UnsafeCheckpointError(CheckpointError, ValueError):
    """A pickle that asks for more than tensors; nothing of it was run."""


INSPECT_HINT = " To see what is inside: diffsynth inspect FILE."


class UnknownCheckpointError(CheckpointError, ValueError):
    """A file whose tensors match no row of the registry."""

    def __init__(self, path: str, num_tensors: int, nearest: str | None, missing: Sequence[str]) -> None:
        near = f"Nearest is {nearest!r}, which also needs {_some(missing)}. " if nearest else ""
        super().__init__(
            f"{path} holds {num_tensors} tensors that match no known model. {near}If the model is split over "
            f"several files, pass them as one inner list: load_models([[part1, part2]]).{INSPECT_HINT}"
        )


class UnsupportedModelError(CheckpointError, NotImplementedError):
    """A network that is recognised by name but not built by this version."""


class ConfigurationError(CheckpointError, ValueError):
    """Sizes that do not fit together, or a size that no rule can tell; the message names the missing key."""


class MediaNotFoundError(DiffSynthError, FileNotFoundError):
    """A video, picture or folder of pictures that does not exist, or holds no picture."""


class MediaReadError(DiffSynthError, ValueError):
    """A video or picture that cannot be decoded."""


class IncompleteCheckpointError(CheckpointError, ValueError):
    """A file that is recognised but lacks tensors of its network, or has tensors of other shapes."""

    def __init__(self, path: str, network: str, num_tensors: int, fault: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{path} is {network} with {num_tensors} tensors, but {len(names)} of the file's {fault}: "
            f"{_some(names)}. If the model is split over several files, give "
            "all of them; otherwise download it again, or export it with all its weights."
        )
        self.names = list(names)


class LoRAFileError(UnknownCheckpointError):
    """A file of LoRA weights where a model was expected."""

    def __init__(self, path: str, num_tensors: int) -> None:
        DiffSynthError.__init__(
            self,
            f"{path} is a LoRA ({num_tensors} tensors), not a model: load the model first, then use "
            "load_lora(PATH, lora_alpha=1.0) on it.",
        )


class PinnedMemoryError(DiffSynthError, MemoryError):
    """The system does not lock as much host memory for the GPU as was asked for."""


class MovedModelError(DiffSynthError, RuntimeError):
    """A network that memory management holds was moved or changed by hand."""


class BusyPipelineError(DiffSynthError, RuntimeError):
    """A pipeline was called while another thread was in a call of it."""


class MemoryBudgetError(DiffSynthError, ValueError):
    """A limit on memory below what the leanest plan takes; says the minimum, its cause and what lowers it."""

    def __init__(self, argument: str, limit_gib: float, minimum_gib: float, phase: str, remedy: str) -> None:
        super().__init__(
            f"{argument} is {limit_gib:.4g} GiB; this request needs at least {minimum_gib:.2f} GiB, "
            f"for {phase}. {remedy}"
        )
        self.argument, self.minimum_gib, self.phase = argument, minimum_gib, phase


class LoRAError(CheckpointError, ValueError):
    """A LoRA that cannot be read, written, or used with the loaded networks; the message says why."""


def install_extra(extra: str, package_folder: Path = Path(__file__).parent) -> str:
    """The command that installs an optional part of this project, and not of another with its name.

    Args:
        extra: a key of setup.py's ``extras_require``.
        package_folder: where this package lies; beside it is setup.py, unless it was installed as a copy.
    """
    checkout = package_folder.resolve().parent
    if (checkout / "setup.py").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install '.[{extra}]' in the folder of the source that this was installed from"


class MissingPackageError(DiffSynthError, ImportError):
    """A package that is not required, and that this call needs."""

    def __init__(self, package: str, needed_for: str, install: str) -> None:
        super().__init__(f"{package} is not installed and {needed_for} needs it: {install}")
        self.package = package

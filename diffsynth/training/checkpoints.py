"""The state of a run in one file, from which it goes on as if it had never stopped.

``<output>/lightning_logs/version_N/checkpoints/epoch=E-step=S.ckpt`` has the keys of a Lightning checkpoint;
its ``state_dict`` holds the trained tensors only, so that it loads as a LoRA or a model. Everything in it is
tensors, numbers, texts, lists and dicts: it is read with ``weights_only=True``.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from diffsynth.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from diffsynth.video.paths import disk_errors, replacing

logger = logging.getLogger("diffsynth")

LOGS, CHECKPOINTS = "lightning_logs", "checkpoints"
NAME = re.compile(r"epoch=(?P<epoch>\d+)-step=(?P<step>\d+)\.ckpt")
EXPERTS = ("high", "low")
FORMAT = 1  # of the part under "diffsynth"
MUST_AGREE = ("model", "method", "optimizer")  # of the facts; others may change, and are told


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a run needs to go on."""

    step: int  # of the optimizer, done
    epoch: int
    tensors: Mapping[str, Tensor]  # trained, under the names of v1
    optimizers: list[dict[str, Any]]  # of each expert, with the names of its parameters
    averages: list[dict[str, Tensor]]  # of each expert, or none
    facts: Mapping[str, str]  # which model, which data, the seed: what must be the same to go on
    course: Mapping[str, float] = field(default_factory=dict)  # of the learning rate, see `optimizers.Course`
    metadata: Mapping[str, str] = field(default_factory=dict)  # rank, alpha, trigger, ...: as in the export


def version_folder(output: Path, resumed: Path | None, *, goes_on: bool = False) -> Path:
    """The folder of a run's logs.

    Args:
        output: of the run.
        resumed: the checkpoint that it goes on from: its folder is the run's, if it lies in ``output``.
        goes_on: without a checkpoint, the last folder is the run's: it was cut off before it saved.
    """
    logs = output / LOGS
    if resumed is not None and resumed.parent.name == CHECKPOINTS:
        folder = resumed.parent.parent
        if folder.parent.resolve() == logs.resolve():
            return folder
    taken = [
        int(found[1])
        for path in logs.glob("version_*")
        if (found := re.fullmatch(r"version_(\d+)", path.name))
    ]
    return logs / f"version_{max(taken, default=-1) + (0 if goes_on and taken and resumed is None else 1)}"


def find_resume(resume: str | None, output: Path) -> Path | None:
    """The checkpoint that ``run.resume`` means; "latest" is the one written last, None where there is none.

    Raises:
        CheckpointNotFoundError: for a path that does not exist.
    """
    if resume is None:
        return None
    if resume != "latest":
        path = Path(resume).expanduser()
        if path.is_dir():
            return _last(list(path.rglob("*.ckpt"))) or _missing(path)
        return path if path.is_file() else _missing(path)
    return _last(list((output / LOGS).glob(f"version_*/{CHECKPOINTS}/*.ckpt")))


def last_checkpoint(folder: Path) -> Path | None:
    """The one of a run's folder that was written last."""
    return _last(list((folder / CHECKPOINTS).glob("*.ckpt")))


def checkpoint_path(folder: Path, state: State) -> Path:
    """Where a state belongs, in the folder of its run."""
    return folder / CHECKPOINTS / f"epoch={state.epoch}-step={state.step}.ckpt"


def write_state(path: Path, state: State) -> None:
    """Write a state, whole or not at all.

    Raises:
        OutputPathError: when the disk is full or fails; nothing half-written stays.
    """
    content = {
        "epoch": state.epoch,
        "global_step": state.step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": dict(state.tensors),
        "optimizer_states": state.optimizers,
        "lr_schedulers": [],  # the learning rate is a function of the step
        "diffsynth": {
            "format": FORMAT,
            "averages": state.averages,
            "facts": dict(state.facts),
            "course": dict(state.course),
        },
        "metadata": dict(state.metadata),
    }
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        noting = _Noting(file)
        try:
            torch.save(content, noting)  # type: ignore[arg-type]
        except RuntimeError:  # torch does not say why a write failed
            if noting.error is not None:
                raise noting.error from None
            raise
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path, *, mapped: bool = False) -> State:
    """Read what `write_state` wrote; nothing in the file is run.

    Args:
        path: of the file.
        mapped: tensors are read when they are looked at.

    Raises:
        CorruptCheckpointError: for a file that is damaged.
        CheckpointError: for one that is no state of a run, such as a file of DiffSynth v1.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged archive or pickle fails in many ways; none of them runs anything
        raise CorruptCheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0][:200]}); go on from an earlier checkpoint "
            "of the same folder."
        ) from None
    own = content.get("diffsynth") if isinstance(content, dict) else None
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds weights and no state of a run of this version, so that no run can go on from it; "
            "run.start_from takes the weights alone."
        )
    return State(
        step=content["global_step"], epoch=content["epoch"], tensors=content["state_dict"],
        optimizers=content["optimizer_states"], averages=own["averages"], facts=own["facts"],
        course=own.get("course", {}),
        metadata=content["metadata"],
    )  # fmt: skip


def export_path(checkpoint: Path, role: str = "") -> Path:
    """Of the safetensors file beside a checkpoint, under its stem; of two experts with "high" or "low".

    ``load_lora`` takes the two of a pair by the name without a role.
    """
    suffix = f"_{role}_noise" if role else ""
    return checkpoint.with_name(f"{checkpoint.stem}{suffix}.safetensors")


def require_same_run(path: Path, state: State, facts: Mapping[str, str], *, quiet: bool = False) -> None:
    """Refuse to go on with another model or method, as far as they are known; tell what else has changed.

    Raises:
        ArgumentError: names what differs.
    """
    for name in MUST_AGREE:
        if name in facts and state.facts.get(name) != facts[name]:
            was, now = (f"{one.get(name)}{_files(one, name)}" for one in (state.facts, facts))
            raise ArgumentError(
                f"{path} was trained with {name} {was}, and this run has {now}. Go on with the same, or take "
                "the weights alone with run.start_from."
            )
    for name in () if quiet else sorted(set(facts) - set(MUST_AGREE)):
        if state.facts.get(name) != facts[name]:
            logger.warning(
                "%s: %s was %s and is %s now; from here on the run is another than it would have been.",
                path.name, name, state.facts.get(name), facts[name],
            )  # fmt: skip


def require_room(folder: Path, num_bytes: int) -> None:
    """Say before the first step that the disk will not hold two checkpoints.

    Raises:
        OutputPathError: when the folder cannot be written, or is too small.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 2 * num_bytes:
            raise OSError(errno.ENOSPC, f"a checkpoint takes about {num_bytes / 1e9:.2f} GB and two must fit")


def drop_old(folder: Path, keep: int, written: Path) -> None:
    """Keep the checkpoints written last, with their exports; 0 keeps all. What was just written stays."""
    found = sorted((folder / CHECKPOINTS).glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    old = [path for path in found if NAME.fullmatch(path.name) and path != written]
    for path in old[max(0, keep - 1) :] if keep else ():
        path.unlink(missing_ok=True)
        for role in ("", *EXPERTS):
            export_path(path, role).unlink(missing_ok=True)


class _Noting:
    """A file that remembers why a write failed."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self.error = file, None

    error: OSError | None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _files(facts: Mapping[str, str], name: str) -> str:
    """Names of files say more to people than a hash."""
    return f" ({facts['model files']})" if name == "model" and "model files" in facts else ""


def _last(paths: list[Path]) -> Path | None:
    """The one written last; steps do not tell, where a run went back to an earlier one."""
    whole = [path for path in paths if NAME.fullmatch(path.name)]
    return max(whole, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def _missing(path: Path) -> Path:
    raise CheckpointNotFoundError(
        f"run.resume is {path}, where no checkpoint (epoch=E-step=S.ckpt) lies; give one, or 'latest'."
    )

"""Steps on the disk: what a render that is killed on its way leaves behind, and how it goes on from there.

The file is safetensors. ``noisy_latents`` (B, C, T, h, w) are the latents before step ``next_step``, in the
dtype in which they are denoised; ``sampler.NAME`` are the tensors that the sampler looks back at, and
``cache.NAME`` those of a step cache. The metadata's ``steps`` (JSON) holds the number of the next step and of
all, the seed, and what decides the rest (`run_facts`). Whoever asked for the file may add texts of his own
(`StepsPath.note`).

Nothing in such a file is code, or a path that is opened here: it is data, compared with what a caller gives.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsynth import __version__
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.saving import save_tensors
from diffsynth.errors import ArgumentError, ResumeError
from diffsynth.pipelines.run_facts import Facts, differences
from diffsynth.pipelines.saved_latents import STEPS_SUFFIX
from diffsynth.video.paths import check_output_path

if TYPE_CHECKING:
    from diffsynth.denoising.step_cache import StepCache
    from diffsynth.models.loras import LoRAs
    from diffsynth.sampling.sampler import Sampler

logger = logging.getLogger("diffsynth")

KEY = "steps"  # of the metadata
PAUSE_S = 60.0  # of work between two saves, where nobody says after how many steps
WRITING_SHARE = 0.05  # of the time, at most, is spent on writing where nobody says
_LATENTS, _SAMPLER, _CACHE = "noisy_latents", "sampler.", "cache."


@dataclass(frozen=True, slots=True)
class StepsPath(os.PathLike[str]):
    """A path for ``save_steps=`` that has more to say.

    Args:
        path: of the file.
        note: gives texts that go into its metadata; called when there is something to write.
        advice: how to go on from the file, for the log; "": by ``resume_from=``.
    """

    path: Path
    note: Callable[[], Mapping[str, str]] = dict
    advice: str = ""

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedSteps:
    """What `read_steps` found."""

    path: Path
    next_step: int
    num_steps: int
    seed: int | None  # None: the caller gave the noise
    latents: Tensor  # (B, C, T, h, w)
    memory: Mapping[str, Tensor]  # of the sampler
    cache_memory: Mapping[str, Tensor]  # of the step cache
    facts: Facts
    note: Mapping[str, str]  # the metadata, as it is

    def check(self, now: Facts, seed: int | None) -> None:
        """Make sure that a call is the one that was left.

        Args:
            now: facts of the call.
            seed: that it gives; None: none.

        Raises:
            ResumeError: names everything that differs.
        """
        found = differences(self.facts, now)
        if seed is not None and seed != self.seed:
            found.insert(0, f"seed was {self.seed} and is {seed}")
        if found:
            raise ResumeError(self.path, found)
        if (made_by := self.note.get("diffsynth")) != __version__:
            logger.warning(
                "%s was written by diffsynth %s and this is %s: the video may differ from that one's.",
                self.path, made_by, __version__,
            )  # fmt: skip

    def check_latents(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise ArgumentError unless the latents are what the call denoises."""
        if tuple(self.latents.shape) != shape or self.latents.dtype != dtype:
            raise ArgumentError(
                f"{self.path} holds latents of shape {tuple(self.latents.shape)}, {self.latents.dtype}; this "
                f"call denoises {shape}, {dtype}: the file was changed."
            )


class StepKeeper:
    """Writes the steps of one generation, now and then.

    Args:
        path: of the file, which is replaced; see `check_steps_path`.
        every: steps between two saves; None: after each minute of work.
        facts: of the run.
        seed: of the run.
        loras: of the pipeline; a callback may change their strength on the way.
        step_cache: of the call.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int | None,
        facts: Facts,
        seed: int | None,
        loras: LoRAs,
        step_cache: StepCache | None = None,
    ) -> None:
        self._target = path if isinstance(path, StepsPath) else StepsPath(Path(path))
        self._path = Path(os.path.realpath(os.path.expanduser(os.fspath(path))))
        self._every, self._facts, self._seed, self._loras = every, facts, seed, loras
        self._step_cache = step_cache
        self._due_at = time.monotonic() + PAUSE_S
        self.kept: int | None = None  # steps that the file holds; None: there is none of this run
        self._has_failed = False

    def after_step(self, next_step: int, latents: Tensor, sampler: Sampler, *, is_last: bool = False) -> None:
        """Write the file if it is time; a disk that refuses costs a warning.

        Args:
            next_step: number of the step that comes, 0-based: as many as are done.
            latents: before that step.
            sampler: knows what it looks back at.
            is_last: no step follows in this call, whatever the grid says; it is time.
        """
        is_due = time.monotonic() >= self._due_at if self._every is None else next_step % self._every == 0
        if not is_due and not is_last:
            return
        started = time.monotonic()
        try:
            self._write(next_step, latents, sampler)
            self.kept, self._has_failed = next_step, False
        except OSError as error:
            if not self._has_failed:
                had = "No step is saved so far." if self.kept is None else f"{self.kept} steps are saved."
                logger.warning("Step %d is not saved, the run goes on. %s %s", next_step, had, error)
            self._has_failed = True
        ended = time.monotonic()
        self._due_at = ended + max(PAUSE_S, (ended - started) / WRITING_SHARE)

    def is_file(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path is that of the file."""
        return self._path == Path(os.path.realpath(os.path.expanduser(os.fspath(path))))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Say where the steps lie, and how to go on from them, when what is inside ends early."""
        try:
            yield
        except BaseException:  # Ctrl-C as well
            if self.kept is not None:
                advice = self._target.advice or f"the same call with resume_from={str(self._path)!r}"
                logger.warning("%d steps are kept in %s; to go on: %s", self.kept, self._path, advice)
            raise

    def _write(self, next_step: int, latents: Tensor, sampler: Sampler) -> None:
        told = {
            "next_step": next_step,
            "num_steps": len(sampler.timesteps),
            "seed": self._seed,
            "facts": {**self._facts, "loras": self._loras.facts()},
        }
        memory = {_SAMPLER + name: tensor for name, tensor in sampler.state().items()}
        if self._step_cache is not None:
            memory |= {_CACHE + name: tensor.clone() for name, tensor in self._step_cache.state().items()}
        metadata = {"format": "pt", "diffsynth": __version__, KEY: json.dumps(told), **self._target.note()}
        save_tensors(self._path, {_LATENTS: latents.clone(), **memory}, metadata)


def check_steps_path(
    path: str | os.PathLike[str],
    every: int | None,
    latents_path: str | os.PathLike[str] | None = None,
) -> None:
    """Make sure that steps can be written there, before the work starts.

    How much room the disk has is not asked: one that fills up on the way costs a warning too.

    Args:
        path: of the file.
        every: steps between two saves.
        latents_path: where the call saves its latents, if it does.

    Raises:
        ArgumentError: when it is no path, ``every`` is below 1, or both paths are one.
        OutputPathError: when it cannot be written, or does not end in .safetensors.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"save_steps is {path!r}; give a path such as 'video{STEPS_SUFFIX}'.")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ArgumentError(
            f"save_every is {every!r}; give a number of steps, 1 or more, or leave it out: steps are then "
            "saved after each minute of work."
        )
    target = check_output_path(path, suffixes=(".safetensors",))
    if latents_path is not None and Path(latents_path).expanduser().resolve() == target:
        raise ArgumentError(f"save_steps and save_latents are one file, {path}; give two.")


def read_steps(path: str | os.PathLike[str]) -> SavedSteps:
    """Read what a `StepKeeper` wrote.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError: for a file that is absent or cut off.
        ArgumentError: for a file that holds no steps, or was changed.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"resume_from is {path!r}; give the file that save_steps= wrote.")
    file = Checkpoint.open(Path(path).expanduser())
    if KEY not in file.metadata or _LATENTS not in file:
        advice = f". Give a file that save_steps= or diffsynth generate wrote, such as video{STEPS_SUFFIX}."
        if "latents" in file:
            command = f"diffsynth decode {shlex.quote(str(path))}"
            advice = f", but latents whose denoising is done; this command makes the video of them: {command}"
        raise ArgumentError(f"{path} holds no steps{advice}")
    told = _told(file)
    latents = file.tensor(_LATENTS).clone()  # not the map: the file is replaced on the way
    names = [name for name in file.shapes if name.startswith(_SAMPLER)]
    if latents.ndim != 5 or any(file.shapes[name] != tuple(latents.shape) for name in names):
        raise _changed(path, "its tensors are not of one shape (B, C, T, h, w)")
    return SavedSteps(
        path=Path(path),
        next_step=told["next_step"],
        num_steps=told["num_steps"],
        seed=told["seed"],
        latents=latents,
        memory=_memory_of(file, _SAMPLER),
        cache_memory=_memory_of(file, _CACHE),
        facts=told["facts"],
        note=file.metadata,
    )


def _memory_of(file: Checkpoint, prefix: str) -> dict[str, Tensor]:
    names = [name for name in file.shapes if name.startswith(prefix)]
    return {name.removeprefix(prefix): file.tensor(name).clone() for name in names}


def _told(file: Checkpoint) -> dict[str, Any]:
    """The metadata's ``steps``, with the types that everything else relies on."""
    try:
        told = json.loads(file.metadata[KEY])
        facts = told["facts"]
        is_sound = (
            _is_count(told["next_step"])
            and _is_count(told["num_steps"])
            and told["next_step"] <= told["num_steps"]
            and (told["seed"] is None or isinstance(told["seed"], int))
            and all(
                isinstance(facts[name], dict) for name in ("settings", "inputs", "networks", "arithmetic")
            )
            and all(isinstance(lora, dict) for lora in facts["loras"])
            and isinstance(facts["tokens"], str | None)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        raise _changed(file.source, f"its {KEY!r} are not what save_steps= writes")
    assert isinstance(told, dict)
    return told


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _changed(path: object, what: str) -> ArgumentError:
    return ArgumentError(f"{path} was changed: {what}.")

"""Two experts of one pipeline: how they share the steps, and how they change places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.pairs import is_dit, is_named
from diffsynth.denoising.expert import Expert
from diffsynth.errors import ArgumentError, DiffSynthError, MissingModelError, UnusedInputError
from diffsynth.models.registry import ARCHITECTURES

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from diffsynth.checkpoints.hints import Role
    from diffsynth.models.model_manager import Paths
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.pipelines.memory import MemoryManager
    from diffsynth.pipelines.options import CallOptions
    from diffsynth.sampling.sampler import Sampler


def boundary_of(parts: PipelineComponents, options: CallOptions) -> float:
    """Share of 1000 below which the low-noise expert answers: the caller's, else the model's."""
    return parts.boundary if options.switch_DiT_boundary is None else options.switch_DiT_boundary


def step_counts(parts: PipelineComponents, options: CallOptions, sampler: Sampler) -> tuple[int, int | None]:
    """Steps of the whole generation, and those of the high-noise expert; None: there is one DiT."""
    if parts.low is None:
        return len(sampler.timesteps), None
    boundary = 1000 * boundary_of(parts, options)
    return len(sampler.timesteps), int((sampler.timesteps.double() >= boundary).sum())


def require_experts(parts: PipelineComponents, options: CallOptions) -> None:
    """Refuse a generation with one expert of a pair, unless the caller wants it.

    Raises:
        MissingModelError: for one expert alone.
        UnusedInputError: for ``single_expert`` where both are loaded.
    """
    if options.single_expert and parts.low is not None:
        raise UnusedInputError("single_expert=True was given, and both experts are loaded; leave it out.")
    if parts.role is not None and not options.single_expert:
        raise missing_expert(parts.role, parts.sources["dit"], IN_PYTHON)


IN_PYTHON = "Load both: load_models([HIGH, LOW, ...]); or let one take every step: pipe(single_expert=True)."
IN_FLAGS = "Give --model for each, or let this one take every step: --single-expert."


def missing_expert(role: Role, source: str, advice: str) -> MissingModelError:
    """What to say of one expert that is alone."""
    other, steps = ("low", "later") if role == "high" else ("high", "first")
    return MissingModelError(
        f"{source} is the {role}-noise expert of a pair, and the {other}-noise one, which makes the {steps} "
        f"steps, is not there. {advice}"
    )


def refuse_one_expert(paths: Paths, dit: Sequence[str]) -> None:
    """The same, by the headers of files that are about to be loaded; other faults of theirs are told then.

    Args:
        paths: as `ModelManager.load_models` takes them.
        dit: the DiTs among them that are used; empty: all.
    """
    try:
        matches = [match for one in Checkpoint.open_all(paths) for match in detect(one, ARCHITECTURES)]
    except DiffSynthError:
        return
    dits = [match for match in matches if is_dit(match)]
    found = [match for match in dits if not dit or any(is_named(match, path) for path in dit)]
    if len(found) == 1 and found[0].role is not None:
        raise missing_expert(found[0].role, found[0].checkpoint.source, IN_FLAGS)


class ExpertMethods:
    """What a pipeline can do with its two experts."""

    parts: PipelineComponents
    _memory: MemoryManager

    if TYPE_CHECKING:

        def _resting(self) -> AbstractContextManager[None]: ...

    def swap_experts(self) -> None:
        """Let the low-noise expert answer at high noise and the other way round.

        For files whose names do not tell which is which, when the order in which they were loaded was wrong.

        Raises:
            ArgumentError: with one DiT only, or while LoRAs are loaded, which belong to an expert.
        """
        parts = self.parts
        if parts.high is None or parts.low is None:
            raise ArgumentError("swap_experts() exchanges two experts, and this pipeline has not two.")
        if parts.loras.names:
            raise ArgumentError(
                f"swap_experts() with LoRAs loaded ({', '.join(parts.loras.names)}), which belong to an "
                "expert: call unload_lora(), swap, and load them again."
            )
        with self._resting():
            parts.high, parts.low = _in_place_of(parts.high, parts.low), _in_place_of(parts.low, parts.high)
            parts.loras.swap_roles()
            sources = parts.sources
            sources["dit"], sources["dit_low_noise"] = sources["dit_low_noise"], sources["dit"]
            self._memory.find_networks()


def _in_place_of(left: Expert, comes: Expert) -> Expert:
    """An expert under the names of another: they say when a network comes to the device."""
    names = dict(zip(_kinds(left), left.networks, strict=True))
    return replace(comes, networks=tuple(names[kind] for kind in _kinds(comes)))


def _kinds(expert: Expert) -> tuple[str, ...]:
    return ("dit", *(adapter.name for adapter in expert.adapters))

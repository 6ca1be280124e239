"""Where a walk through the steps begins, and who writes them down on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.noise import DRAWN, chosen_seed, noise_shape
from diffsynth.pipelines.request import VideoRequest
from diffsynth.pipelines.run_facts import run_facts
from diffsynth.pipelines.saved_steps import StepKeeper, read_steps
from diffsynth.sampling.sampler import Sampler

logger = logging.getLogger("diffsynth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """Of one generation."""

    seed: int | None  # None: the caller gave the noise
    first_step: int = 0
    latents: Tensor | None = None  # before the first step, on the device; None: noise
    keeper: StepKeeper | None = None
    cache_memory: Mapping[str, Tensor] | None = None  # of a step cache, where the walk goes on

    def telling(self) -> AbstractContextManager[None]:
        """Around the steps: see `StepKeeper.telling`."""
        return nullcontext() if self.keeper is None else self.keeper.telling()

    def after_step(self, step: int, latents: Tensor, sampler: Sampler, *, is_last: bool = False) -> None:
        """Step ``step`` is done; see `StepKeeper.after_step`."""
        if self.keeper is not None:
            self.keeper.after_step(step + 1, latents, sampler, is_last=is_last)


def plot_course(
    request: VideoRequest,
    arguments: Mapping[str, object],
    parts: PipelineComponents,
    precision: str,
    sampler: Sampler,
) -> Course:
    """Return the course of a call; where it goes on from saved steps, the sampler is restored to them.

    Args:
        request: the checked call.
        arguments: as the caller gave them, without iterators.
        parts: of the pipeline.
        precision: of the pipeline.
        sampler: of the request, reset.

    Raises:
        ResumeError: when the saved steps are of another run; names what differs.
        ArgumentError: for a file that holds no steps, or a seed and noise that are both given.
    """
    options = request.options
    if options.save_steps is None and options.resume_from is None:
        return Course(seed=chosen_seed(request))
    facts = run_facts(request, arguments, parts, precision)
    seed, first_step, latents, cache_memory = None, 0, None, None
    if options.resume_from is None:
        seed = chosen_seed(request)
    else:
        saved = read_steps(options.resume_from)
        saved.check(facts, None if options.seed == DRAWN else options.seed)
        saved.check_latents(
            noise_shape(request, request.extra_frames), parts.dtype if precision == "v1" else torch.float32
        )
        memory = {name: tensor.to(parts.device) for name, tensor in saved.memory.items()}
        sampler.restore(saved.next_step, memory)
        cache_memory = {name: tensor.to(parts.device) for name, tensor in saved.cache_memory.items()}
        seed, first_step, latents = saved.seed, saved.next_step, saved.latents.to(parts.device)
        logger.info("%s: %d of %d steps are done, seed %s.", saved.path, first_step, saved.num_steps, seed)
    keeper = None
    if options.save_steps is not None:
        keeper = StepKeeper(
            options.save_steps, options.save_every, facts, seed, parts.loras, options.step_cache
        )
        if options.resume_from is not None and keeper.is_file(options.resume_from):
            keeper.kept = first_step
    return Course(seed=seed, first_step=first_step, latents=latents, keeper=keeper, cache_memory=cache_memory)

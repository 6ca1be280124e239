"""The table of samplers: what a user writes in ``sampler=`` and the class that answers."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.sampling.dpmpp import DPMSolverPlusPlusSampler
from diffsynth.sampling.euler import EulerSampler
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.unipc import UniPCSampler

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "euler": EulerSampler,  # DiffSynth v1; the default, so that a v1 script keeps its video
    "unipc": UniPCSampler,  # the official default
    "dpm++": DPMSolverPlusPlusSampler,  # the official alternative
}

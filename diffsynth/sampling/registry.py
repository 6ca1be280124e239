"""The table of samplers: what a user writes in ``sampler=`` and the class that answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffsynth.sampling.dpmpp import DPMSolverPlusPlusSampler
from diffsynth.sampling.euler import EulerSampler
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.unipc import UniPCSampler

if TYPE_CHECKING:
    from torch import Tensor

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "euler": EulerSampler,  # DiffSynth v1; the default, so that a v1 script keeps its video
    "unipc": UniPCSampler,  # the official default
    "dpm++": DPMSolverPlusPlusSampler,  # the official alternative
}


def sampler_for(
    name: str,
    *,
    num_steps: int | None,
    shift: float | None,
    strength: float = 1.0,
    sigmas: Sequence[float] | Tensor | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
) -> Sampler:
    """Return a sampler that is set to the noise levels of one generation.

    Args:
        name: a key of `SAMPLERS`.
        num_steps: calls of the denoiser; not read with ``sigmas``, nor are shift and strength.
        shift: see `shifted_sigmas`.
        strength: the same.
        sigmas: a user's own grid; see `Sampler.set_sigmas`.
        timesteps: that go with it.

    Raises:
        ArgumentError: for a grid that cannot work.
    """
    sampler = SAMPLERS[name]()
    if sigmas is not None:
        sampler.set_sigmas(sigmas, timesteps)
    else:
        assert num_steps is not None and shift is not None
        sampler.reset(num_steps, shift, strength)
    return sampler

"""How the DiTs of a pipeline multiply."""

from __future__ import annotations

import logging

from diffsynth.errors import ArgumentError
from diffsynth.ops.attention import AUTOMATIC, attention_kernel
from diffsynth.ops.fp8 import Compute, fp8_layers
from diffsynth.ops.fp8_policy import set_fp8_compute
from diffsynth.pipelines.components import PipelineComponents

logger = logging.getLogger("diffsynth")


def choose_kernels(
    parts: PipelineComponents, attention: str | None = None, fp8_compute: Compute | None = None
) -> None:
    """Set the attention kernel and the arithmetic of fp8 weights; None is the automatic choice.

    Raises:
        ArgumentError: when a choice is unknown, not available here, or there is nothing that it is for.
    """
    experts = [expert for expert in (parts.high, parts.low) if expert is not None]
    if not experts:
        raise ArgumentError("No DiT is loaded, so that there is nothing to choose a kernel for.")
    if fp8_compute is not None and not any(fp8_layers(expert.dit) for expert in experts):
        raise ArgumentError(
            f"fp8_compute is {fp8_compute!r}, but no weights are kept in fp8; load the DiT with "
            "torch_dtype=torch.float8_e4m3fn (--dtype fp8)."
        )
    kernel = attention_kernel(attention or AUTOMATIC, parts.device)
    for expert in experts:
        expert.dit.attention = kernel
        if fp8_layers(expert.dit):
            logger.info(
                "%s: fp8 weights, %s",
                expert.networks[0],
                set_fp8_compute(expert.dit, parts.device, fp8_compute),
            )

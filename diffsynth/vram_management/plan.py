"""Arithmetic before action: what stays on the device, what visits it, what is streamed, and what it takes.

A generation has phases: text, image, encode (where pictures are given), one per DiT, vae. Weights are needed
in their phase only, so each phase may have all the room. Nothing here imports torch and nothing is loaded: a
header is enough.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from diffsynth.errors import ArgumentError
from diffsynth.vram_management.activations import Workload
from diffsynth.vram_management.arrange import Arrangement, PlanRequest
from diffsynth.vram_management.choices import DITS, LOW_NOISE, spread
from diffsynth.vram_management.layers import (
    LayerSpec,
    NetworkSize,
    layers_of_module,
    layers_of_shapes,
    sizes_of,
)
from diffsynth.vram_management.memory_plan import MemoryPlan, NetworkPlan, PhasePlan
from diffsynth.vram_management.rates import DEFAULT_RATES, DiTSizes, Rates

__all__ = [
    "DEFAULT_RATES", "DiTSizes", "LayerSpec", "MemoryPlan", "NetworkPlan", "PhasePlan", "Rates",
    "layers_of_module", "layers_of_shapes", "persistent_parameters", "plan_memory", "spread",
]  # fmt: skip

logger = logging.getLogger("diffsynth")


def plan_memory(  # noqa: PLR0913
    layers: Sequence[LayerSpec],
    *,
    dit: DiTSizes | None,
    height: int,
    width: int,
    num_frames: int,
    num_branches: int = 2,
    batch: int = 1,
    text_tokens: int = 512,
    image_tokens: int = 0,
    encodes: bool | None = None,
    compute_dtype: str = "BF16",
    device: str = "cuda",
    multiplies_fp8: bool = False,
    num_persistent_param_in_dit: int | None = None,
    vram_limit_gib: float | None = None,
    ram_limit_gib: float | None = None,
    rates: Rates = DEFAULT_RATES,
) -> MemoryPlan:
    """Plan a generation.

    Args:
        layers: every tensor of every network, as it is stored; see `layers_of_shapes`, `layers_of_module`.
        dit: sizes of the DiTs; None when there is none.
        height: pixels; taken up to the next size that the DiT can.
        width: the same.
        num_frames: of the video; taken up to the next 4 k + 1.
        num_branches: sides of the guidance, 2, or 1 without.
        batch: videos at a time.
        text_tokens: of a prompt, at most.
        image_tokens: that cross-attention reads beside the text: 257 a picture.
        encodes: whether the VAE codes pictures or videos that are given; None: where a DiT or an adapter may
            read some, or there is no DiT.
        compute_dtype: of activations, "BF16", "F16" or "F32".
        device: "cuda", or "cpu", which plays a device of the same limit.
        multiplies_fp8: a DiT multiplies in fp8 what it may.
        num_persistent_param_in_dit: about that many parameters of each DiT stay for its phase; 0 none; more
            than there are: all; None as many as fit.
        vram_limit_gib: of the device; None for no limit.
        ram_limit_gib: of the host; None for no limit.
        rates: of the machine.

    Returns:
        The plan. With neither limit nor a number of parameters everything stays on the device.

    Raises:
        MemoryBudgetError: when a limit is below what the leanest plan takes; says the minimum.
        ArgumentError: for a value that cannot work.
    """
    work = Workload(
        height=height, width=width, num_frames=num_frames, num_branches=num_branches, batch=batch,
        text_tokens=text_tokens, image_tokens=image_tokens, compute_dtype=compute_dtype, device=device,
        multiplies_fp8=multiplies_fp8,
    )  # fmt: skip
    sizes = sizes_of(layers)
    if dit is None and any(name in sizes for name in DITS):
        raise ArgumentError("layers hold a DiT, but dit= has no sizes; give DiTSizes.from_config(config).")
    request = PlanRequest(
        layers=tuple(layers), sizes=sizes, dit=dit, work=work, rates=rates, vram_limit_gib=vram_limit_gib,
        ram_limit_gib=ram_limit_gib,
        num_persistent=persistent_parameters(sizes, num_persistent_param_in_dit),
        encodes=_can_encode(layers) and (_may_encode(sizes, dit) if encodes is None else encodes),
    )  # fmt: skip
    request.check_device()
    ringed: frozenset[str] = frozenset()
    while True:
        plan = Arrangement(request, ringed).plan()
        room = request.host_room_bytes
        if plan.pinned_bytes + plan.pageable_bytes <= room:
            return plan
        name = _next_for_ring(plan, ringed)
        if name is None:
            raise request.host_error(plan.pinned_bytes + plan.pageable_bytes)
        ringed |= {name}
        if plan.networks[name].is_of_pair:  # one ring serves both experts
            ringed |= {name.removesuffix(LOW_NOISE), name.removesuffix(LOW_NOISE) + LOW_NOISE}


def _can_encode(layers: Sequence[LayerSpec]) -> bool:
    return any(layer.network == "vae" and layer.name.startswith("encoder.") for layer in layers)


def _may_encode(sizes: Mapping[str, NetworkSize], dit: DiTSizes | None) -> bool:
    """Whether something reads pictures: planes beside the noise, an adapter, or nobody is there to ask."""
    reads = any(name.startswith(("vace", "reference")) for name in sizes)
    return dit is None or dit.in_dim > dit.out_dim or reads


def persistent_parameters(sizes: Mapping[str, NetworkSize], wanted: int | None) -> int | None:
    """Parameters of each DiT that stay on the device: what is wanted, but no more than there are.

    A number above the model's size means all, as it did in DiffSynth v1, where scripts gave one number for
    models of every size; the log says so.

    Raises:
        ArgumentError: for a number below 0, or without a DiT.
    """
    if wanted is None:
        return None
    dits = [sizes[name] for name in DITS if name in sizes]
    if not dits:
        raise ArgumentError(f"num_persistent_param_in_dit is {wanted}, but there is no DiT; leave it out.")
    if wanted < 0:
        raise ArgumentError(
            f"num_persistent_param_in_dit is {wanted}; give a number of parameters: 0 (none stays) or more, "
            "or None for as many as fit."
        )
    most = min(size.num_parameters for size in dits)
    if wanted > most:
        logger.warning(
            "num_persistent_param_in_dit is %d and the DiT has %d parameters: all stay.", wanted, most
        )
    return min(wanted, most)


def _next_for_ring(plan: MemoryPlan, ringed: frozenset[str]) -> str | None:
    """The network whose blocks travel least often, among those that hold more than the ring would."""
    order = sorted(plan.networks, key=lambda name: DITS[::-1].index(name) if name in DITS else -1)
    flat = [n for n in order if plan.networks[n].where == "streamed" and plan.networks[n].host != "ring"]
    return next((name for name in flat if name not in ringed), None)

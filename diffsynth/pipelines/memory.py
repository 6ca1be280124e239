"""What a pipeline may use of the machine's memory, and the plan that follows for one call."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Literal

import torch

from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.errors import ArgumentError
from diffsynth.ops.fp8 import fp8_layers
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.request import TEMPORAL_STRIDE, VideoRequest, usual_values
from diffsynth.vram_management.layers import sizes_of as layer_sizes
from diffsynth.vram_management.plan import (
    DiTSizes,
    LayerSpec,
    MemoryPlan,
    layers_of_module,
    persistent_parameters,
    plan_memory,
)
from diffsynth.vram_management.residency import Residency
from diffsynth.vram_management.visit import BlockNetwork

logger = logging.getLogger("diffsynth")

GIB = 2**30
AUTO_SHARE = 0.95  # of what is free: the rest is for the context of kernels and the allocator's gaps
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimits:
    """What `enable_vram_management` was given."""

    num_persistent_param_in_dit: int | None = None  # about so many parameters of each DiT stay on the device
    vram_limit: float | Literal["auto"] | None = None  # GiB; "auto": what is free when a call begins
    ram_limit: float | None = None  # GiB of host memory for resting weights
    vram_buffer: float | None = None  # GiB of vram_limit that are left free

    def __post_init__(self) -> None:
        count = self.num_persistent_param_in_dit
        is_whole = isinstance(count, Real) and not isinstance(count, bool) and count % 1 == 0  # 7e9 is
        if count is not None and (not is_whole or count < 0):
            raise ArgumentError(
                f"num_persistent_param_in_dit is {count!r}; give a number of parameters: 0 streams every "
                "block, None leaves the choice to vram_limit."
            )
        if count is not None:
            object.__setattr__(self, "num_persistent_param_in_dit", int(count))
        for name, value in (("vram_limit", self.vram_limit), ("ram_limit", self.ram_limit)):
            if value == "auto" and name == "vram_limit":
                continue
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < math.inf):  # type: ignore[operator]
                raise ArgumentError(f"{name} is {value!r}; give GiB above 0, such as 12, or None.")
        self._check_buffer()

    def _check_buffer(self) -> None:
        buffer, limit = self.vram_buffer, self.vram_limit
        if buffer is None:
            return
        if limit is None:
            raise ArgumentError(f"vram_buffer is {buffer!r}, of a vram_limit that was not given; give both.")
        most = limit if isinstance(limit, (int, float)) else float("inf")
        if not isinstance(buffer, (int, float)) or not 0 <= buffer < most:
            raise ArgumentError(f"vram_buffer is {buffer!r}; give GiB from 0, and less than vram_limit.")

    @property
    def is_free(self) -> bool:
        """Nothing is limited: networks come for their phase as a whole."""
        return self == MemoryLimits()

    def vram_gib(self, device: torch.device) -> float | None:
        """The limit in GiB, "auto" resolved, without what is left free."""
        buffer = self.vram_buffer or 0.0
        if self.vram_limit is None or self.vram_limit != "auto":
            return None if self.vram_limit is None else self.vram_limit - buffer
        if device.type != "cuda":
            raise ArgumentError(f'vram_limit is "auto" and the device is {device}; give GiB there.')
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0.0, (free + unused) * AUTO_SHARE / GIB - buffer)


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSizes:
    """The sizes of a call that decide what fits."""

    height: int  # pixels
    width: int
    num_frames: int
    num_videos: int = 1
    num_branches: int = 2  # sides of the guidance
    encodes: bool | None = (
        None  # the VAE codes what is given; None: where the networks may be given something
    )


def sizes_of(request: VideoRequest, parts: PipelineComponents) -> CallSizes:
    """The sizes of a call."""
    is_guided = request.cfg_scale != 1.0 or request.cfg_scale_low_noise != 1.0
    geometry = request.geometry
    readers = ((CONDITIONERS[name], inputs) for name, inputs in request.inputs.items())
    return CallSizes(
        height=geometry.height, width=geometry.width,
        num_frames=geometry.num_frames + TEMPORAL_STRIDE * request.extra_frames,
        num_videos=geometry.num_videos, num_branches=2 if is_guided else 1,
        encodes=any(one.encoder == "vae" and one.needs_encoder(inputs, parts) for one, inputs in readers),
    )  # fmt: skip


def usual_sizes(parts: PipelineComponents) -> CallSizes:
    """The sizes of a call that gives none."""
    usual = usual_values(parts)
    height, width, num_frames = (int(str(usual[name])) for name in ("height", "width", "num_frames"))
    return CallSizes(height=height, width=width, num_frames=num_frames)


def plan_call(parts: PipelineComponents, limits: MemoryLimits, sizes: CallSizes) -> MemoryPlan:
    """Plan one call.

    Raises:
        MemoryBudgetError: when it does not fit; says the minimum and what lowers it.
        ArgumentError: when parameters of a DiT are to stay and there is none.
    """
    config = None if parts.high is None else parts.high.dit.config
    return plan_memory(
        pipeline_layers(parts),
        dit=None if config is None else DiTSizes.from_config(asdict(config)),
        image_tokens=0 if config is None or config.image_dim is None else config.image_tokens_pos or 257,
        height=sizes.height,
        width=sizes.width,
        num_frames=sizes.num_frames,
        num_branches=sizes.num_branches,
        batch=sizes.num_videos,
        encodes=sizes.encodes,
        compute_dtype=DTYPES.get(parts.dtype, "BF16"),
        device=parts.device.type,
        multiplies_fp8=_multiplies_fp8(parts),
        num_persistent_param_in_dit=limits.num_persistent_param_in_dit,
        vram_limit_gib=limits.vram_gib(parts.device),
        ram_limit_gib=limits.ram_limit,
    )


def _multiplies_fp8(parts: PipelineComponents) -> bool:
    """Whether a DiT rounds its tokens to fp8, which takes room beside them."""
    dits = [expert.dit for expert in (parts.high, parts.low) if expert is not None]
    return any(layer.compute == "fp8" for dit in dits for layer in fp8_layers(dit))


def pipeline_layers(parts: PipelineComponents) -> Sequence[LayerSpec]:
    """Every tensor of every network that is loaded."""
    return [
        layer
        for name, network in parts.networks().items()
        if network is not None
        for layer in layers_of_module(name, network)
    ]


class MemoryManager:
    """Holds a pipeline's networks to its limits, call by call.

    Args:
        parts: of the pipeline.
    """

    def __init__(self, parts: PipelineComponents) -> None:
        self._parts = parts
        self._limits: MemoryLimits | None = None
        self.plan: MemoryPlan | None = None  # of the last call, or of the usual one; None without limits
        self.residency = Residency(parts.networks(), parts.device)

    def find_networks(self) -> None:
        """Look again which network has which name; nothing may be under limits meanwhile."""
        self.residency.name_networks(self._parts.networks())

    def move_to(self, device: torch.device) -> None:
        """Let networks compute there; nothing may be under limits meanwhile."""
        self.residency.move_to(device)

    def rest_on_host(self) -> None:
        """Let the weights rest on the host, and come to the device for their phase."""
        self.residency.close()
        self._move_to_host()
        self.find_networks()

    def limit(self, limits: MemoryLimits) -> None:
        """Follow these limits from now on, in place of earlier ones; raises as `plan_call`."""
        if limits.num_persistent_param_in_dit is not None:
            sizes = layer_sizes(pipeline_layers(self._parts))
            count = persistent_parameters(sizes, limits.num_persistent_param_in_dit)
            limits = replace(limits, num_persistent_param_in_dit=count)  # so that no call says it again
        plan = None if limits.is_free else plan_call(self._parts, limits, usual_sizes(self._parts))
        self._limits = None if limits.is_free else limits
        if plan is not None:
            self.residency.release()  # what only visits is not taken for loaded there
            self._move_to_host()
        self._follow(plan)

    def prepare(self, request: VideoRequest) -> None:
        """Plan a call and arrange the networks for it; raises as `plan_call`, before anything moves."""
        if self._limits is not None:
            self._follow(plan_call(self._parts, self._limits, sizes_of(request, self._parts)))

    def release(self) -> None:
        """No limits, plain networks, no memory held."""
        self._limits = None
        self._follow(None)
        self.residency.close()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Plain networks while their layers are changed; afterwards the limits hold again."""
        limits = self._limits
        self.release()
        try:
            yield
        finally:
            self.residency.close()
            if limits is not None:
                self.limit(limits)

    def _move_to_host(self) -> None:
        for name, network in self._parts.networks().items():
            if network is not None and any(p.device.type != "cpu" for p in network.parameters()):
                logger.warning(
                    "The weights of %s were loaded onto the device; they rest on the host from now on. Load "
                    'them with ModelManager(device="cpu") to spare the way there and back.',
                    name,
                )
                network.to("cpu")

    def _follow(self, plan: MemoryPlan | None) -> None:
        before = {} if self.plan is None else self.plan.networks
        after = {} if plan is None else plan.networks
        if after != before:
            # A limit of the host's memory counts what is locked for streams, and nothing beside.
            self.residency.arrange(after, may_lock=self._limits is None or self._limits.ram_limit is None)
        self._parts.tiled_by_plan = plan is not None and plan.tiled_encode
        for expert in (self._parts.high, self._parts.low):
            if expert is not None:
                for network in (expert.dit, *expert.adapters):
                    if isinstance(network, BlockNetwork):
                        network.keeps_keys = plan is None or plan.keeps_keys
                expert.dit.ffn_chunk_tokens = None if plan is None else plan.ffn_chunk_tokens
        self.plan = plan

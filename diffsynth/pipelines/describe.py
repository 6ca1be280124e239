"""What a pipeline says about itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.ops.attention import describe_attention
from diffsynth.ops.fp8 import dtype_name
from diffsynth.ops.fp8_policy import fp8_summary
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.vram_management.memory_plan import MemoryPlan

GIB = 2**30


def describe(
    parts: PipelineComponents,
    precision: str,
    memory: MemoryPlan | None = None,
    locked: Mapping[str, int] | None = None,
) -> str:
    """Lines of text: networks, experts, kernels, memory, inputs, defaults.

    Args:
        parts: of the pipeline.
        precision: of the pipeline.
        memory: the plan that holds.
        locked: bytes of host memory that are pinned for networks which come as a whole, by network.
    """
    lines = [f"WanVideoPipeline on {parts.device}, {dtype_name(parts.dtype)}, precision {precision!r}"]
    for name, network in parts.networks().items():
        lines.append(f"  {name}: {'not loaded' if network is None else _network(network)}")
        if network is not None and (summary := fp8_summary(network)):
            lines.append(f"    {summary}")
        if name in parts.sources:
            lines.append(f"    from {parts.sources[name]}")
    if parts.high is not None:
        config = parts.high.dit.config
        planes = ", ".join(f"{k} ({v})" for k, v in config.planes.items()) or "none"
        lines.append(
            f"  kind: {parts.family}, width {config.dim}, {config.num_layers} blocks, "
            f"{config.num_heads} heads, planes: {planes}"
        )
    if parts.low is not None:
        lines.append(f"  two experts, the low-noise one below timestep {parts.boundary * 1000:g}")
    if parts.role is not None:
        lines.append(f"  the {parts.role}-noise expert of a pair, alone")
    if parts.high is not None:
        lines.append(f"  attention: {describe_attention(parts.device, parts.high.dit.attention)}")
    lines += [f"  {line}" for line in describe_loras(parts)]
    if memory is not None:
        lines += [f"  {line}" for line in describe_memory(memory)]
    lines += [f"  {line}" for line in _pinned(memory, locked or {})]
    read = sorted(name for name, conditioner in CONDITIONERS.items() if conditioner.reads(parts.facts))
    lines.append("  inputs: " + ", ".join(read))
    if parts.generation:
        lines.append(
            "  defaults from the checkpoint: " + ", ".join(f"{k}={v}" for k, v in parts.generation.items())
        )
    return "\n".join(lines)


def describe_loras(parts: PipelineComponents) -> list[str]:
    """Lines of text: each LoRA, and what of it fitted."""
    told = parts.loras.describe()
    return ["LoRAs:", *(f"  {line}" for line in told)] if told else []


def describe_memory(plan: MemoryPlan) -> list[str]:
    """Lines of text: the peak, and where each network is."""
    lines = [f"memory: planned peak {plan.peak_bytes / GIB:.2f} GiB, {plan.verdict}"]
    for name, network in plan.networks.items():
        if network.where == "streamed":
            stay = f"{len(network.resident_blocks)} of {network.num_blocks} blocks stay"
            lines.append(
                f"  {name}: {stay}, {network.num_slots} slots, the others rest in {network.host} memory"
            )
        else:
            how = "stays on the device" if network.where == "resident" else "comes for its phase"
            lines.append(f"  {name}: {how}")
    return [*lines, *(f"  {note}" for note in plan.notes)]


def _pinned(plan: MemoryPlan | None, locked: Mapping[str, int]) -> list[str]:
    streamed = 0 if plan is None else plan.pinned_bytes
    sizes = {**locked, **({"streamed blocks": streamed} if streamed else {})}
    told = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in sizes.items())
    return [f"pinned host memory: {sum(sizes.values()) / GIB:.2f} GiB ({told})"] if sizes else []


def _network(network: nn.Module) -> str:
    tensors = list(network.parameters())
    count = sum(t.numel() for t in tensors)
    size = sum(t.numel() * t.element_size() for t in tensors) / GIB
    kinds = ", ".join(sorted({f"{dtype_name(t.dtype)} on {t.device}" for t in tensors}))
    return f"{type(network).__name__}, {count / 1e6:.1f} M parameters, {size:.2f} GiB, {kinds}"

"""A stream of blocks whose copies are timed one by one, and what the memory plan says about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.common import GB
from benchmarks.gpu.shared import VideoSize, config_of, seconds_of
from diffsynth.models.wan.dit import WanDiT
from diffsynth.vram_management.copiers import (
    Copier,
    Mark,
    Source,
    StreamCopier,
    ThreadCopier,
    Transfer,
    host_buffer,
)
from diffsynth.vram_management.fp8 import widening
from diffsynth.vram_management.plan import DiTSizes, MemoryPlan, Rates, layers_of_module, plan_memory
from diffsynth.vram_management.streaming import BlockStream
from diffsynth.vram_management.visit import in_order

FAST_COPIES, SLOW_COPIES = Rates(copy_gbs=1e6), Rates(copy_gbs=1e-3)  # the two verdicts, whatever the machine


class TimedStreamCopier(StreamCopier):
    """With an event on either side of each copy, behind the wait for the slot."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []

    def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        free()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stream.record_event(before)
        transfer = super().fetch(target, source, start, stop, lambda: None)
        self._stream.record_event(after)
        self._spans.append((before, after, stop - start))
        return transfer

    def take_rates(self) -> list[float]:
        """Bytes/s of the copies since the last time this was asked."""
        self._stream.synchronize()
        spans, self._spans = self._spans, []
        return [size * 1000 / before.elapsed_time(after) for before, after, size in spans]


@dataclass(frozen=True)
class _TimedSource:
    source: Source
    rates: list[float]

    def read_into(self, target: Tensor, start: int, stop: int) -> None:
        begun = time.perf_counter()
        self.source.read_into(target, start, stop)
        self.rates.append((stop - start) / max(time.perf_counter() - begun, 1e-9))


class TimedThreadCopier(ThreadCopier):
    """The same for the CPU as the device; may be used again after it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self._rates: list[float] = []

    def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        return super().fetch(target, _TimedSource(source, self._rates), start, stop, free)

    def close(self) -> None:
        super().close()
        self._worker = ThreadPoolExecutor(1)

    def take_rates(self) -> list[float]:
        """Bytes/s of the copies since the last time this was asked."""
        taken = list(self._rates)
        self._rates.clear()
        return taken


class StreamedDiT:
    """A DiT whose blocks rest in host memory from now on; ``arrange`` says how they come.

    Args:
        dit: on the device; its blocks are carried to flat host buffers one by one.
        device: where it computes.
    """

    def __init__(self, dit: WanDiT, device: torch.device) -> None:
        self._dit = dit
        is_gpu = device.type == "cuda"
        self.copier = TimedStreamCopier(device) if is_gpu else TimedThreadCopier()
        carrier: Copier = self.copier
        self.stream = BlockStream(
            list(dit.blocks), device=device, host="pinned" if is_gpu else "pageable", copier=carrier
        )
        dit.visit = widening(dit, self.stream)

    def arrange(self, resident: Sequence[int] = (), num_slots: int = 2) -> None:
        """Choose what stays; the rest is streamed through ``num_slots``."""
        self.stream.arrange(resident, num_slots)

    def all_resident(self) -> None:
        """Bring every block to the device."""
        self.arrange(range(len(self._dit.blocks)))

    def close(self) -> None:
        """Leave the weights in plain, pageable host memory."""
        self.stream.close()
        self._dit.visit = widening(self._dit, in_order)


def plan_for(
    dit: WanDiT,
    size: VideoSize,
    device: torch.device,
    *,
    num_branches: int = 2,
    num_persistent: int | None = 0,
    rates: Rates | None = None,
) -> MemoryPlan:
    """What `plan_memory` says of this network alone."""
    return plan_memory(
        layers_of_module("dit", dit),
        dit=DiTSizes.from_config(config_of(dit)),
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        num_branches=num_branches,
        device=device.type,
        num_persistent_param_in_dit=num_persistent,
        rates=rates or Rates(),
    )


def plan_text(plan: MemoryPlan) -> str:
    """Its choices in a few words."""
    chosen = [
        f"{plan.networks['dit'].num_slots} slots" if plan.networks["dit"].where == "streamed" else "resident",
        "both sides together" if plan.interleaves_branches else "one side at a time",
        "keys kept" if plan.keeps_keys else "no keys kept",
    ]
    return f"{plan.verdict}: {', '.join(chosen)}"


def copy_alone_gbs(num_bytes: int, device: torch.device, *, is_pinned: bool = True) -> float:
    """GB/s of one host buffer to the device with nothing else under way; the median of ten copies."""
    source = host_buffer(num_bytes, device if is_pinned and device.type == "cuda" else None)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    copies = [seconds_of(lambda: source.read_into(target, 0, num_bytes), device) for _ in range(12)]
    return num_bytes / median(copies[2:]) / GB


def largest_block_bytes(dit: nn.Module) -> int:
    """Of the blocks of a network, as they are stored."""
    blocks: Sequence[nn.Module] = list(dit.blocks)  # type: ignore[arg-type]
    return max(sum(t.numel() * t.element_size() for t in (*b.parameters(), *b.buffers())) for b in blocks)

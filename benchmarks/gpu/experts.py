"""Two experts of A14B that stream one after the other: the peak, and what the switch makes the device wait.

    python -m benchmarks.gpu.experts                     # two random 14B DiTs, 480P; 57 GB of host memory
    python -m benchmarks.gpu.experts --host ring         # blocks stay in plain memory, read through one ring
    python -m benchmarks.gpu.experts --toy               # seconds on a CPU

Each round walks through two steps of either expert. What is timed at the switch lies between the end of the
last high-noise step and the first block of the low-noise expert, which embeds its text meanwhile; the same
stretch between two steps of one expert is what it is compared with. "cold" is the switch without sending the
low-noise expert ahead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.common import GB, Row
from benchmarks.gpu.shared import (
    MODELS,
    SIZES,
    Inputs,
    Measured,
    Recorder,
    VideoSize,
    config_of,
    free,
    inputs_for,
    parser,
    random_dit,
    recorder,
    synchronise,
)
from benchmarks.gpu.streams import plan_text
from diffsynth.denoising.expert import Expert, Experts
from diffsynth.denoising.loop import steps_of
from diffsynth.models.wan.dit import WanDiT
from diffsynth.sampling.euler import EulerSampler
from diffsynth.vram_management.memory_plan import MemoryPlan
from diffsynth.vram_management.plan import DiTSizes, layers_of_module, plan_memory
from diffsynth.vram_management.residency import Residency

NAMES = ("dit", "dit_low_noise")
BOUNDARY = 0.875
TIMES = (950.0, 900.0, 850.0, 800.0)  # two steps of either expert
SWITCH = 2  # the first step of the low-noise expert


class Marks:
    """Points in the device's order of things, and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def set(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each two that follow each other."""
        synchronise(self._device)
        found = []
        for one, other in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(one, float) and isinstance(other, float):
                found.append(other - one)
            elif isinstance(one, torch.cuda.Event) and isinstance(other, torch.cuda.Event):
                found.append(one.elapsed_time(other) / 1000)
        return found


class Pair:
    """Two random DiTs that rest on the host, and how they come to the device."""

    def __init__(self, model: str, size: VideoSize, device: torch.device, *, is_ring: bool) -> None:
        self.device = device
        self.dits = [self._resting(model) for _ in NAMES]
        self.inputs: Inputs = inputs_for(self.dits[0], size, device)
        self.plan = self._plan(size)
        networks = self.plan.networks
        if is_ring:
            networks = {name: replace(network, host="ring") for name, network in networks.items()}
        self.residency = Residency(dict(zip(NAMES, self.dits, strict=True)), device)
        self.residency.arrange(networks)
        for dit in self.dits:
            dit.keeps_keys, dit.ffn_chunk_tokens = self.plan.keeps_keys, self.plan.ffn_chunk_tokens

    def _resting(self, model: str) -> WanDiT:
        dit = random_dit(model, self.device).to("cpu")
        free(self.device)
        return dit

    def _plan(self, size: VideoSize) -> MemoryPlan:
        layers = [
            layer for name, dit in zip(NAMES, self.dits, strict=True) for layer in layers_of_module(name, dit)
        ]
        return plan_memory(
            layers, dit=DiTSizes.from_config(config_of(self.dits[0])), height=size.height, width=size.width,
            num_frames=size.num_frames, device=self.device.type, num_persistent_param_in_dit=0,
        )  # fmt: skip

    def walk(self, *, sends_ahead: bool) -> tuple[list[float], list[float]]:
        """One round: seconds of each step, and from the end of each step to the next one's first block."""
        high, low = (Expert(dit=dit, networks=(name,)) for dit, name in zip(self.dits, NAMES, strict=True))
        experts = Experts(
            high, low, BOUNDARY, bring_in=self.residency.enter,
            send_ahead=self.residency.send_ahead if sends_ahead else None,
            interleaves=self.plan.interleaves_branches,
        )  # fmt: skip
        marks, begun = Marks(self.device), [False]

        def at_first_block(*_: object) -> None:
            if not begun[0]:
                begun[0] = True
                marks.set()

        hooks = [dit.blocks[0].register_forward_pre_hook(at_first_block) for dit in self.dits]
        grid = EulerSampler()
        grid.set_sigmas([value / 1000 for value in TIMES])
        steps = steps_of(grid, experts, self.inputs.latents.shape)
        marks.set()
        for step in steps:
            begun[0] = False
            experts(self.inputs.latents, step, self.inputs.sides)
            marks.set()
        for hook in hooks:
            hook.remove()
        spans = marks.seconds()  # of each step: to its first block, and from there to its end
        return [a + b for a, b in zip(spans[::2], spans[1::2], strict=True)], spans[::2]

    def measure(self, repeats: int, *, sends_ahead: bool) -> tuple[Measured, list[list[float]]]:
        """Seconds at the switch beyond those between two steps of one expert, and the spans of each round."""
        self.walk(sends_ahead=sends_ahead)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        rounds = [self.walk(sends_ahead=sends_ahead)[1] for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        stalls = [max(0.0, spans[SWITCH] - spans[SWITCH + 1]) for spans in rounds]
        return Measured(seconds=stalls, peak_bytes=peak), rounds


def run(model: str, size: VideoSize, out: Recorder, repeats: int, *, is_ring: bool) -> None:
    host = "ring" if is_ring else "pinned" if out.device.type == "cuda" else "pageable"
    label = f"two experts {model} {size.name}, {host}"
    pair = out.attempt(label, partial(Pair, model, size, out.device, is_ring=is_ring))
    if pair is None:
        return
    for name, sends_ahead in (("switch", True), ("cold switch", False)):
        measured = out.attempt(f"{label}: {name}", partial(pair.measure, repeats, sends_ahead=sends_ahead))
        if measured is not None:
            add(out, f"{label}: {name}", pair.plan, measured, is_goal=sends_ahead)
    pair.residency.close()


def add(
    out: Recorder,
    figure: str,
    plan: MemoryPlan,
    found: tuple[Measured, Sequence[Sequence[float]]],
    *,
    is_goal: bool,
) -> None:
    """The stall, and the peak."""
    measured, rounds = found
    spans = ", ".join("/".join(f"{1000 * span:.1f}" for span in spans) for spans in rounds)
    out.add(
        Row(
            figure=f"{figure}, stall", unit="s", ours=measured.seconds, goal="<= 0.060" if is_goal else "",
            notes=f"ms from each step's end to the next one's first block: {spans}",
        )
    )  # fmt: skip
    if measured.peak_bytes:
        out.add(
            Row(
                figure=f"{figure}, peak", unit="GB", ours=[measured.peak_gb], peer_name="plan_memory",
                peer=[plan.peak_bytes / GB], goal="<= 8 GB" if is_goal else "", notes=plan_text(plan),
            )
        )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="14B", choices=tuple(MODELS))
    arguments.add_argument("--size", default="480P", choices=tuple(SIZES))
    arguments.add_argument("--host", default="pinned", choices=("pinned", "ring"))
    words = sys.argv[1:] if words is None else words
    given = arguments.parse_args(words)
    if given.toy:
        given.model = given.size = "toy"
    with torch.no_grad():
        out = recorder("experts", given, words)
        run(given.model, SIZES[given.size], out, given.repeats, is_ring=given.host == "ring")


if __name__ == "__main__":
    main()

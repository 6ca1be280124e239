"""One forward of the DiT at full size: resident and streamed, against its kernels alone and against peers.

    python -m benchmarks.gpu.dit                                  # 14B, 480P, all groups
    python -m benchmarks.gpu.dit --sizes 720P --groups ours,floor,streamed
    python -m benchmarks.gpu.dit --toy                            # seconds on a CPU

Weights are random and made on the device; all contenders share them. Groups: `ours` resident; `floor`, the
matrix products and the attention of a forward, each timed alone on the same shapes and kernels; `peers`
resident; `streamed`, every block from pinned host memory, once lean (2 slots, one side of the guidance at a
time, no keys kept) and once with both sides together and kept keys, beside the plan's prediction; `few`, a
short clip that waits for its copies; `offloaded`, the peers' ways to stream. Peers run the first size only.
Steps have two sides of the guidance, forwards one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import GB, Row
from benchmarks.gpu.diffsynth_dit import PlainDiT, manage
from benchmarks.gpu.diffusers_peers import diffusers_dit, forward_of, offload_in_groups
from benchmarks.gpu.shared import (
    MODELS,
    SIZES,
    TEXT_TOKENS,
    Inputs,
    Measured,
    Recorder,
    VideoSize,
    free,
    inputs_for,
    kernel_seconds,
    measured,
    parser,
    random_dit,
    recorder,
    stepping,
)
from benchmarks.gpu.streams import (
    FAST_COPIES,
    SLOW_COPIES,
    StreamedDiT,
    copy_alone_gbs,
    largest_block_bytes,
    plan_for,
    plan_text,
)
from diffsynth.models.wan.dit import WanDiT
from diffsynth.ops.attention import attend, describe_attention
from diffsynth.vram_management.plan import MemoryPlan, Rates

GROUPS = ("ours", "floor", "peers", "streamed", "few", "offloaded")
PEAK_GOALS = {("14B", "480P"): "<= 4.5 GB", ("14B", "720P"): "<= 6.5 GB"}
WITHIN_10_PERCENT = "within 10 % of the plan"


@dataclass
class Run:
    """One network, and what was found so far, by size."""

    dit: WanDiT
    model: str
    out: Recorder
    repeats: int
    resident: dict[str, Measured] = field(default_factory=dict)  # one forward of ours
    floor: dict[str, float] = field(default_factory=dict)  # seconds of a forward's kernels
    streamed: dict[str, Measured] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.out.device

    def label(self, size: VideoSize) -> str:
        return f"DiT {self.model} {size.name}"

    def measure(self, work: Callable[[], object], repeats: int | None = None) -> Measured:
        return measured(work, self.device, repeats=repeats or self.repeats)

    def add(self, figure: str, ours: Sequence[float], unit: str = "s", **more: Any) -> None:
        """A row; ``more`` are its other fields."""
        self.out.add(Row(figure=figure, unit=unit, ours=ours, **more))

    def inputs(self, size: VideoSize) -> Inputs:
        return inputs_for(self.dit, size, self.device)


def run_ours(run: Run, size: VideoSize) -> None:
    inputs, label = run.inputs(size), run.label(size)
    told = f"{inputs.tokens} tokens; {describe_attention(run.device)}"
    one = run.resident[size.name] = run.measure(stepping(run.dit, inputs, 1))
    run.add(figure=f"{label}: resident bf16, forward", ours=one.seconds, notes=told)
    add_peak(run, size, f"{label}: resident bf16, forward, peak", one, plan_of(run, size, 1, None))
    both = run.measure(stepping(run.dit, inputs, 2), max(1, run.repeats - 1))
    run.add(figure=f"{label}: resident bf16, step", ours=both.seconds, notes=told)
    add_peak(run, size, f"{label}: resident bf16, step, peak", both, plan_of(run, size, 2, None))


def plan_of(
    run: Run, size: VideoSize, num_branches: int, num_persistent: int | None, rates: Rates | None = None
) -> MemoryPlan:
    return plan_for(
        run.dit, size, run.device, num_branches=num_branches, num_persistent=num_persistent, rates=rates
    )


def add_peak(
    run: Run, size: VideoSize, figure: str, found: Measured, plan: MemoryPlan, goal: str | None = None
) -> None:
    is_gpu = run.device.type == "cuda"
    run.add(
        figure=figure,
        unit="GB",
        ours=[found.peak_gb],
        peer_name="plan_memory",
        peer=[plan.peak_bytes / GB],
        goal=goal or WITHIN_10_PERCENT,
        notes=f"max_memory_allocated; {plan_text(plan)}" if is_gpu else "of the process",
    )


def kernels_of(
    dit: WanDiT, inputs: Inputs, device: torch.device
) -> Mapping[str, tuple[int, Callable[[], Tensor]]]:
    """The products and attentions of one forward with kept keys: how many there are, and one of each."""
    config, block, dtype = dit.config, dit.blocks[0], dit.dtype
    layers, heads = config.num_layers, (config.num_heads, config.dim // config.num_heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, hidden = random(1, inputs.tokens, config.dim), random(1, inputs.tokens, config.ffn_dim)
    q, k, v = (random(1, inputs.tokens, *heads) for _ in range(3))
    text_k, text_v = (random(1, TEXT_TOKENS, *heads) for _ in range(2))
    return {
        "q, k, v, o; q, o of cross-attention": (6 * layers, lambda: block.self_attn.q(x)),  # type: ignore[operator, union-attr]
        "feed-forward, rising": (layers, lambda: block.ffn[0](x)),  # type: ignore[index, operator]
        "feed-forward, falling": (layers, lambda: block.ffn[2](hidden)),  # type: ignore[index, operator]
        "self-attention": (layers, lambda: attend(q, k, v)),
        "cross-attention": (layers, lambda: attend(q, text_k, text_v)),
    }


def run_floor(run: Run, size: VideoSize) -> None:
    inputs, label = run.inputs(size), run.label(size)
    spent = {
        name: count * kernel_seconds(work, run.device)
        for name, (count, work) in kernels_of(run.dit, inputs, run.device).items()
    }
    run.floor[size.name] = sum(spent.values())
    notes = "; ".join(f"{name} {seconds:.3f} s" for name, seconds in spent.items())
    if size.name not in run.resident:
        run.resident[size.name] = run.measure(stepping(run.dit, inputs, 1))
    run.add(
        figure=f"{label}: resident bf16, forward, against its kernels alone",
        ours=run.resident[size.name].seconds,
        peer_name="sum of its kernels",
        peer=[run.floor[size.name]],
        goal=">= 0.90",
        notes=notes,
    )


def against(
    run: Run, figure: str, ours: Measured | None, name: str, peer: Measured | None, goal: str
) -> None:
    """Two rows, of time and of peak; none when either failed."""
    if ours is None or peer is None:
        return
    run.add(figure=figure, ours=ours.seconds, peer_name=name, peer=peer.seconds, goal=goal)
    run.add(figure=f"{figure}, peak", unit="GB", ours=[ours.peak_gb], peer_name=name, peer=[peer.peak_gb])


def run_peers(run: Run, size: VideoSize) -> None:
    """The peers on resident weights."""
    inputs, label = run.inputs(size), run.label(size)
    ours = run.resident.get(size.name) or run.measure(stepping(run.dit, inputs, 1))

    def diffsynth() -> Measured:
        peer = PlainDiT.sharing(run.dit)
        manage(peer, run.device, None)
        latents = inputs.latents.to(run.dit.dtype)
        return run.measure(lambda: peer(latents, inputs.timestep, inputs.text))

    def diffusers() -> Measured:
        return run.measure(forward_of(diffusers_dit(run.dit), inputs, run.dit.dtype))

    for name, goal, work in (("DiffSynth's way", "", diffsynth), ("diffusers", ">= 1.45", diffusers)):
        figure = f"{label}: resident bf16, forward, against {name}"
        against(run, figure, ours, name, run.out.attempt(figure, work), goal)


def run_streamed(run: Run, streamed: StreamedDiT, size: VideoSize, alone_gbs: float) -> None:
    """All blocks from host memory."""
    inputs, label = run.inputs(size), run.label(size)
    streamed.arrange()
    lean = partial(stepping, run.dit, inputs, interleaves=False, keeps_keys=False)
    streamed.copier.take_rates()
    one = run.streamed[size.name] = run.measure(lean(1))
    add_copy_rate(run, size, streamed.copier.take_rates(), alone_gbs)
    both = run.measure(lean(2), max(1, run.repeats - 1))
    peak_goal = PEAK_GOALS.get((run.model, size.name))
    add_peak(
        run, size, f"{label}: streamed lean, step, peak", both, plan_of(run, size, 2, 0, FAST_COPIES),
        f"{peak_goal}; {WITHIN_10_PERCENT}" if peak_goal else None,
    )  # fmt: skip
    eager = run.measure(stepping(run.dit, inputs, 2), max(1, run.repeats - 1))
    add_peak(
        run, size, f"{label}: streamed, sides together and keys kept, step, peak", eager,
        plan_of(run, size, 2, 0, SLOW_COPIES),
    )  # fmt: skip
    # Measured after and not only before: a device that grows hot slows both sides down.
    streamed.all_resident()
    again = run.measure(stepping(run.dit, inputs, 1))
    before = run.resident.get(size.name, again)
    here = plan_of(run, size, 2, 0, rates_here(run, size, alone_gbs, before))
    run.add(
        figure=f"{label}: streamed lean, step, against sides together and keys kept",
        ours=both.seconds,
        peer_name="ours, together",
        peer=eager.seconds,
        notes=f"the plan for this machine: {plan_text(here)}",
    )
    run.add(
        figure=f"{label}: streamed lean, forward, against resident",
        ours=one.seconds,
        peer_name="ours, resident",
        peer=again.seconds if before is again else [*before.seconds, *again.seconds],
        goal=">= 0.97 (at most 1.03 x resident)",
        notes=f"resident before {median(before.seconds):.4g} s, after {median(again.seconds):.4g} s",
    )


def rates_here(run: Run, size: VideoSize, alone_gbs: float, resident: Measured) -> Rates:
    """What was measured: copies alone, and the operations of a resident forward in its time."""
    config, tokens = run.dit.config, run.inputs(size).tokens
    operations = config.num_layers * (
        2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
        + 4 * tokens * config.dim * (tokens + TEXT_TOKENS)
    )
    return Rates(copy_gbs=alone_gbs, tflops=operations / median(resident.seconds) / 1e12)


def add_copy_rate(run: Run, size: VideoSize, rates: list[float], alone_gbs: float) -> None:
    figure = f"{run.label(size)}: a gigabyte to the device while it computes"
    if not rates:
        run.out.fail(figure, "no copy was made")
        return
    run.add(
        figure=figure,
        ours=[GB / rate for rate in rates],
        peer_name="nothing else under way",
        peer=[1 / alone_gbs],
        goal=">= 0.9",
        notes=f"{median(rates) / GB:.1f} GB/s against {alone_gbs:.1f}",
    )


def run_few(run: Run, streamed: StreamedDiT, size: VideoSize) -> None:
    """A clip so short that a step waits for its copies: what the plan does about it."""
    inputs, label = run.inputs(size), run.label(size)
    streamed.all_resident()
    resident = run.measure(stepping(run.dit, inputs, 2))
    streamed.arrange()
    found = {
        "one side at a time": run.measure(stepping(run.dit, inputs, 2, interleaves=False, keeps_keys=False)),
        "sides together": run.measure(stepping(run.dit, inputs, 2, keeps_keys=False)),
        "sides together and keys kept": run.measure(stepping(run.dit, inputs, 2)),
    }
    first = found["one side at a time"]
    for name, way in found.items():
        run.add(
            figure=f"{label}: streamed, step, {name}",
            ours=way.seconds,
            peer_name="ours, one side at a time",
            peer=first.seconds,
            goal=">= 1.6" if name != "one side at a time" else "",
            notes=f"{inputs.tokens} tokens; resident {median(resident.seconds):.4g} s",
        )


def run_offloaded(run: Run, size: VideoSize) -> None:
    """The peers' ways to stream, on weights that lie in plain host memory."""
    inputs, label = run.inputs(size), run.label(size)
    ours = run.streamed.get(size.name)

    def diffsynth() -> Measured:
        peer = PlainDiT.sharing(run.dit)
        manage(peer, run.device, 0)
        latents = inputs.latents.to(run.dit.dtype)
        return run.measure(lambda: peer(latents, inputs.timestep, inputs.text), 1)

    def diffusers(offload_type: str) -> Measured:
        peer = diffusers_dit(run.dit)
        offload_in_groups(peer, run.device, offload_type)
        return run.measure(forward_of(peer, inputs, run.dit.dtype), max(1, run.repeats - 1))

    works: Mapping[str, tuple[str, Callable[[], Measured]]] = {
        "DiffSynth's way": (">= 2.2; peak <= 0.45 x", diffsynth),
        "diffusers block_level": ("", partial(diffusers, "block_level")),
        "diffusers leaf_level": ("", partial(diffusers, "leaf_level")),
    }
    for name, (goal, work) in works.items():
        figure = f"{label}: streamed lean, forward, against {name}"
        found = run.out.attempt(figure, work)
        free(run.device)
        if found is not None and ours is None:
            run.add(figure=f"{label}: streamed by {name}, forward", ours=found.seconds)
        against(run, figure, ours, name, found, goal)


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="14B", choices=tuple(MODELS))
    arguments.add_argument("--sizes", default="480P", help=f"with commas: {', '.join(SIZES)}")
    arguments.add_argument("--groups", default=",".join(GROUPS), help="with commas; see above")
    words = sys.argv[1:] if words is None else words
    given = arguments.parse_args(words)
    check(given, arguments)
    with torch.no_grad():
        run_groups(given, recorder("dit", given, words))


def check(given: argparse.Namespace, arguments: argparse.ArgumentParser) -> None:
    if given.toy:
        given.model, given.sizes = "toy", "toy"
    given.sizes, given.groups = given.sizes.split(","), given.groups.split(",")
    for name, known in (("sizes", tuple(SIZES)), ("groups", GROUPS)):
        if unknown := set(getattr(given, name)) - set(known):
            arguments.error(f"--{name}: {', '.join(sorted(unknown))} is unknown; known: {', '.join(known)}.")


def run_groups(given: argparse.Namespace, out: Recorder) -> None:
    sizes = [SIZES[name] for name in given.sizes]
    run = Run(random_dit(given.model, out.device), given.model, out, given.repeats)
    for size in sizes:
        for group, work in (("ours", run_ours), ("floor", run_floor), ("peers", run_peers)):
            if group in given.groups and (group != "peers" or size is sizes[0]):
                out.attempt(f"{run.label(size)}: group {group}", partial(work, run, size))
    if {"streamed", "few"} & set(given.groups):
        out.attempt(f"DiT {run.model}: group streamed", partial(stream_groups, run, sizes, given))
    if "offloaded" in given.groups:
        for block in run.dit.blocks:
            block.to("cpu")  # after the groups above they are there already
        out.attempt(f"{run.label(sizes[0])}: group offloaded", partial(run_offloaded, run, sizes[0]))


def stream_groups(run: Run, sizes: list[VideoSize], given: argparse.Namespace) -> None:
    alone_gbs = copy_alone_gbs(largest_block_bytes(run.dit), run.device)
    pageable_gbs = copy_alone_gbs(largest_block_bytes(run.dit), run.device, is_pinned=False)
    run.add(
        figure=f"DiT {run.model}: a block to the device, pinned, nothing else under way",
        unit="GB/s",
        ours=[alone_gbs],
        notes=f"{largest_block_bytes(run.dit) / GB:.3f} GB; pageable {pageable_gbs:.1f} GB/s",
    )
    streamed = StreamedDiT(run.dit, run.device)
    try:
        if "streamed" in given.groups:
            for size in sizes:
                work = partial(run_streamed, run, streamed, size, alone_gbs)
                run.out.attempt(f"{run.label(size)}: streamed", work)
        if "few" in given.groups:
            short = SIZES["toy" if given.toy else "480P17"]
            run.out.attempt(f"{run.label(short)}: streamed", partial(run_few, run, streamed, short))
    finally:
        streamed.close()


if __name__ == "__main__":
    main()

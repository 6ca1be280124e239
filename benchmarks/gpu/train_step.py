"""One step of LoRA training: seconds and peak memory, against DiffSynth's way on the same weights.

    python -m benchmarks.gpu.train_step --models 1.3B,14B
    python -m benchmarks.gpu.train_step --toy              # seconds on a CPU

Rank 16 on q, k, v, o and the feed-forward, batch 1, bfloat16, AdamW; random weights. A step is forward,
backward and optimizer. DiffSynth's way: every block checkpointed, torch's default attention, RoPE in
complex128, its norms and modulations; its offload of checkpoints is torch's save_on_cpu. GB = 1e9 bytes of
max_memory_allocated; on the CPU that of the whole process, which tells nothing of a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.common import GB, Row
from benchmarks.gpu.diffsynth_dit import PlainDiT
from benchmarks.gpu.shared import (
    MODELS,
    SIZES,
    Inputs,
    Measured,
    Recorder,
    VideoSize,
    free,
    inputs_for,
    measured,
    parser,
    random_dit,
    recorder,
)
from diffsynth.models.wan.dit import WanDiT
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.offload import CheckpointOffload
from diffsynth.training.recompute import Mode, Recompute, StreamedBase
from diffsynth.training.tuning import TuneConfig, tune

LORA = TuneConfig(rank=16, alpha=16.0)
THEIRS = "DiffSynth's way"
PEAKS_GB = {  # goals: (model, way) -> at most
    ("14B", "full"): 52, ("14B", "keep_attention"): 66, ("1.3B", "full"): 12, ("14B", "streamed"): 16,
}  # fmt: skip
GROUPS = ("ours", "theirs", "streamed")
Velocity = Callable[[Tensor, Tensor], Tensor]  # of noisy latents and timesteps


@dataclass
class Run:
    """One model at one size."""

    dit: WanDiT
    model: str
    size: VideoSize
    out: Recorder
    repeats: int

    @property
    def label(self) -> str:
        return f"LoRA step {self.model} {self.size.name}"

    @property
    def inputs(self) -> Inputs:
        return inputs_for(self.dit, self.size, self.out.device, num_sides=1)

    def measure(self, network: nn.Module, velocity: Velocity) -> Measured:
        """Time whole steps of a network whose factors are made here, and taken away afterwards."""
        tuned = tune(network, (), LORA)
        tuned.to(self.out.device)
        try:
            work = step_of(velocity, list(tuned.parameters().values()), self.inputs)
            return measured(work, self.out.device, repeats=self.repeats)
        finally:
            tuned.detach()
            free(self.out.device)

    def peak(self, way: str, found: Measured) -> None:
        goal = PEAKS_GB.get((self.model, way))
        self.out.add(
            Row(
                figure=f"{self.label}: {way}, peak",
                unit="GB",
                ours=[found.peak_gb],
                goal=f"<= {goal}" if goal else "",
            )
        )


def step_of(velocity: Velocity, factors: list[nn.Parameter], inputs: Inputs) -> Callable[[], float]:
    """Forward, backward and optimizer."""
    objective, optimizer = FlowMatchObjective(), torch.optim.AdamW(factors, lr=1e-4)
    sigma, noise = objective.draw(0, 0, ["a"], inputs.latents.shape[1:])
    noise = noise.to(inputs.latents.device)
    noisy = objective.noisy(inputs.latents, noise, sigma)

    def step() -> float:
        with torch.enable_grad():
            answer = velocity(noisy, objective.timesteps(sigma, noisy.shape[2]))
            loss = objective.loss(answer, inputs.latents, noise, sigma)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ours(run: Run, mode: Mode, *, is_offloaded: bool = False, base: StreamedBase | None = None) -> Measured:
    """Our step; the factors are there before the blocks are streamed."""
    text = run.inputs.sides[0].conditions
    offload = CheckpointOffload() if is_offloaded else None
    recompute = Recompute(mode, offload=offload, bring_back=base.bring_back if base else None)

    def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
        return run.dit(noisy, timestep, [run.dit.prepare(text)])[0]  # type: ignore[no-any-return]

    recompute.install([run.dit])
    try:
        return run.measure(run.dit, velocity)
    finally:
        recompute.remove()
        if offload is not None:
            offload.close()


def theirs(run: Run, *, is_offloaded: bool = False) -> Measured:
    """The baseline on the same weights."""
    peer, text = PlainDiT.sharing(run.dit), run.inputs.text
    for block in peer.blocks:
        block.forward = partial(checkpointed, block.forward, is_offloaded)  # type: ignore[method-assign]

    def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
        dtype = run.dit.dtype
        return peer(noisy.to(dtype), timestep, text.to(dtype)).float()  # type: ignore[no-any-return]

    return run.measure(peer, velocity)


def checkpointed(forward: Callable[..., Tensor], is_offloaded: bool, *inputs: Tensor) -> Tensor:
    hooks = torch.autograd.graph.save_on_cpu() if is_offloaded else nullcontext()
    with hooks:
        return checkpoint(forward, *inputs, use_reentrant=False)  # type: ignore[no-any-return]


def run_resident(run: Run, groups: list[str]) -> dict[str, Measured]:
    """All weights on the device: both ways of checkpointing, against the baseline."""
    found: dict[str, Measured] = {}
    modes: tuple[Mode, ...] = ("full", "keep_attention")
    for mode in modes if "ours" in groups else ():
        one = run.out.attempt(f"{run.label}: {mode}", partial(ours, run, mode))
        if one is not None:
            found[mode] = one
            run.peak(mode, one)
    peer = None
    if "theirs" in groups:
        peer = run.out.attempt(f"{run.label}: {THEIRS}", partial(theirs, run))
    for mode, one in found.items():
        run.out.add(
            Row(
                figure=f"{run.label}: {mode}",
                unit="s",
                ours=one.seconds,
                peer_name=THEIRS if peer else "",
                peer=peer.seconds if peer else (),
                goal=">= 1.3 by one of the two" if run.model == "14B" and peer else "",
                notes=f"peak {one.peak_gb:.1f} GB" + (f" against {peer.peak_gb:.1f}" if peer else ""),
            )
        )
    return found


def run_streamed(run: Run, resident: Measured | None) -> None:
    """Weights and checkpoints on the host, against the same checkpointing with all weights on the device."""
    full = resident or run.out.attempt(f"{run.label}: full", partial(ours, run, "full"))
    run.dit.to("cpu")
    free(run.out.device)
    streamed = run.out.attempt(f"{run.label}: streamed", partial(ours_streamed, run))
    if streamed is None:
        return
    run.peak("streamed", streamed)
    run.out.add(
        Row(
            figure=f"{run.label}: streamed, checkpoints offloaded, full checkpointing",
            unit="s",
            ours=streamed.seconds,
            peer_name="resident, full checkpointing" if full else "",
            peer=full.seconds if full else (),
            goal=">= 0.91: at most 1.10 of resident" if run.model == "14B" else "",
            notes=f"{median(streamed.seconds):.3g} s, peak {streamed.peak_bytes / GB:.1f} GB",
        )
    )


def ours_streamed(run: Run) -> Measured:
    # Streamed before the factors are attached: they are no part of a block's bytes then, nor later.
    base = StreamedBase([run.dit], run.out.device)
    try:
        return ours(run, "full", is_offloaded=True, base=base)
    finally:
        base.close()


def run_model(given: argparse.Namespace, out: Recorder, model: str) -> None:
    dit = random_dit(model, out.device)
    for name in given.sizes:
        run = Run(dit, model, SIZES[name], out, given.repeats)
        found = run_resident(run, given.groups)
        if "theirs" in given.groups:
            offloaded = out.attempt(
                f"{run.label}: {THEIRS}, offloaded", partial(theirs, run, is_offloaded=True)
            )
            if offloaded is not None:
                notes = f"peak {offloaded.peak_gb:.1f} GB"
                figure = f"{run.label}: {THEIRS}, checkpoints by save_on_cpu"
                out.add(Row(figure=figure, unit="s", ours=offloaded.seconds, notes=notes))
        if "streamed" in given.groups:
            run_streamed(run, found.get("full"))
            dit.to(out.device)


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", default="1.3B,14B", help=f"with commas: {', '.join(MODELS)}")
    arguments.add_argument("--sizes", default="480P", help=f"with commas: {', '.join(SIZES)}")
    arguments.add_argument("--groups", default=",".join(GROUPS), help="with commas; see above")
    words = sys.argv[1:] if words is None else words
    given = arguments.parse_args(words)
    if given.toy:
        given.models, given.sizes = "toy", "toy"
    for name, known in (("models", tuple(MODELS)), ("sizes", tuple(SIZES)), ("groups", GROUPS)):
        setattr(given, name, getattr(given, name).split(","))
        if unknown := set(getattr(given, name)) - set(known):
            arguments.error(f"--{name}: {', '.join(sorted(unknown))} is unknown; known: {', '.join(known)}.")
    out = recorder("train_step", given, words)
    for model in given.models:
        out.attempt(f"LoRA step {model}", partial(run_model, given, out, model))
        free(out.device)


if __name__ == "__main__":
    main()

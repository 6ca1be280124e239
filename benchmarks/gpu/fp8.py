"""Weights in fp8: as fp8 products against bf16, and streamed against DiffSynth's way to stream fp8.

    python -m benchmarks.gpu.fp8            # 14B, 480P
    python -m benchmarks.gpu.fp8 --toy      # seconds on a CPU, where there is no fast fp8 product

The same random weights are measured in bf16, then kept in fp8 with a scale per row. The baseline keeps plain
casts of everything in pageable host memory and widens them on the CPU, one blocking copy per layer and call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import GB, Row
from benchmarks.gpu.diffsynth_dit import PlainDiT, manage
from benchmarks.gpu.shared import (
    MODELS,
    SIZES,
    Inputs,
    Measured,
    Recorder,
    VideoSize,
    inputs_for,
    measured,
    parser,
    random_dit,
    recorder,
    stepping,
)
from benchmarks.gpu.streams import FAST_COPIES, StreamedDiT, plan_for, plan_text
from diffsynth.models.wan.dit import WanDiT
from diffsynth.ops.fp8 import FP8, quantise
from diffsynth.ops.fp8_policy import fp8_summary, put_fp8_layers, set_fp8_compute
from diffsynth.vram_management.fp8 import widening
from diffsynth.vram_management.visit import in_order


def store_in_fp8(dit: WanDiT) -> None:
    """Keep the layers of its policy in fp8, on the device where they lie."""
    wide = {name: layer.weight.data for name, layer in dit.fp8_policy.layers(dit).items()}
    for name in put_fp8_layers(dit):
        layer = dit.get_submodule(name)
        layer.weight.data, layer.weight_scale = quantise(wide.pop(name), name)
    dit.visit = widening(dit, in_order)


def cast_to_fp8(dit: WanDiT) -> PlainDiT:
    """The baseline's storage: everything cast, nothing scaled; ours keeps its weights."""
    return PlainDiT.sharing(dit).to(FP8)


def relative(a: Tensor, b: Tensor) -> float:
    """Length of the difference over length of ``b``."""
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


class Fp8Run:
    """The contenders, in the order in which they can follow each other."""

    def __init__(self, model: str, size: VideoSize, out: Recorder, repeats: int) -> None:
        self.out, self.size, self.repeats, self.device = out, size, repeats, out.device
        self.dit = random_dit(model, out.device)
        self.inputs: Inputs = inputs_for(self.dit, size, out.device, num_sides=1)
        self.label = f"DiT {model} {size.name}"
        self.exact: Tensor | None = None

    def measure(self, work: Callable[[], object], repeats: int | None = None) -> Measured:
        return measured(work, self.device, repeats=repeats or self.repeats)

    def run(self) -> None:
        peer = self.out.attempt(f"{self.label}: the baseline's weights in fp8", self._baseline)
        wide = self.out.attempt(f"{self.label}: resident bf16, forward", self._wide)
        store_in_fp8(self.dit)
        for compute in ("widened", "fp8"):
            figure = f"{self.label}: resident fp8, {compute} to multiply, forward"
            self.out.attempt(figure, partial(self._resident, figure, compute, wide))
        streamed = StreamedDiT(self.dit, self.device)
        ours: dict[str, Measured | None] = {}
        for compute in ("widened", "fp8"):
            figure = f"{self.label}: streamed fp8, {compute} to multiply, forward"
            ours[compute] = self.out.attempt(figure, partial(self._streamed, compute))
        streamed.close()
        theirs = None
        if peer is not None:
            figure = f"{self.label}: streamed fp8 by DiffSynth's way, forward"
            theirs = self.out.attempt(figure, partial(self._run_baseline, peer))
        for compute, found in ours.items():
            if found is not None:
                self._add_streamed(compute, found, theirs)

    def _baseline(self) -> PlainDiT:
        peer = cast_to_fp8(self.dit)
        manage(peer, self.device, 0)
        return peer

    def _wide(self) -> Measured:
        step = stepping(self.dit, self.inputs, 1)
        found = self.measure(step)
        self.exact = step()[0]
        self.out.add(Row(figure=f"{self.label}: resident bf16, forward", unit="s", ours=found.seconds))
        return found

    def _resident(self, figure: str, compute: str, wide: Measured | None) -> None:
        why = set_fp8_compute(self.dit, self.device, compute)  # type: ignore[arg-type]
        step = stepping(self.dit, self.inputs, 1)
        found = self.measure(step)
        velocity = step()[0]
        error = "" if self.exact is None else f"; velocity {relative(velocity, self.exact):.1e} from bf16's"
        self.out.add(
            Row(
                figure=figure,
                unit="s",
                ours=found.seconds,
                peer_name="ours, bf16",
                peer=wide.seconds if wide else (),
                goal=">= 1.13" if compute == "fp8" else "",
                notes=f"{fp8_summary(self.dit)} ({why}); peak {found.peak_gb:.2f} GB{error}",
            )
        )

    def _streamed(self, compute: str) -> Measured:
        set_fp8_compute(self.dit, self.device, compute)  # type: ignore[arg-type]
        step = stepping(self.dit, self.inputs, 1, interleaves=False, keeps_keys=False)
        return self.measure(step)

    def _run_baseline(self, peer: PlainDiT) -> Measured:
        latents = self.inputs.latents.to(torch.bfloat16)
        return self.measure(lambda: peer(latents, self.inputs.timestep, self.inputs.text), 1)

    def _add_streamed(self, compute: str, ours: Measured, theirs: Measured | None) -> None:
        figure = f"{self.label}: streamed fp8, {compute} to multiply, forward"
        plan = plan_for(self.dit, self.size, self.device, num_branches=1, rates=FAST_COPIES)
        self.out.add(
            Row(
                figure=figure,
                unit="s",
                ours=ours.seconds,
                peer_name="DiffSynth's way, fp8" if theirs else "",
                peer=theirs.seconds if theirs else (),
                goal=">= 3",
            )
        )
        self.out.add(
            Row(
                figure=f"{figure}, peak",
                unit="GB",
                ours=[ours.peak_gb],
                peer_name="plan_memory",
                peer=[plan.peak_bytes / GB],
                goal="within 10 % of the plan",
                notes=f"{plan_text(plan)}; DiffSynth's way {theirs.peak_gb:.2f} GB" if theirs else "",
            )
        )


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="14B", choices=tuple(MODELS))
    arguments.add_argument("--size", default="480P", choices=tuple(SIZES))
    words = sys.argv[1:] if words is None else words
    given = arguments.parse_args(words)
    if given.toy:
        given.model = given.size = "toy"
    with torch.no_grad():
        Fp8Run(given.model, SIZES[given.size], recorder("fp8", given, words), given.repeats).run()


if __name__ == "__main__":
    main()

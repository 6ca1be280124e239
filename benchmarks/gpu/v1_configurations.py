"""The five configurations of DiffSynth's table: seconds per step and peak memory, ours beside its way.

    python -m benchmarks.gpu.v1_configurations         # 14B, 480P, 81 frames, guidance on
    python -m benchmarks.gpu.v1_configurations --toy   # seconds on a CPU

Weights in bf16 with all, 7e9 or no parameters of the DiT kept on the device, and in fp8 with all or none.
Ours is arranged as `enable_vram_management(num_persistent_param_in_dit=...)` arranges it: as the plan says.
DiffSynth's published figures for them, on one A100: 18.5, 20.8 and 23.4 s with 48, 24 and 10 G; 18.3 and
24.0 s with 24 and 10 G. Ours and the baseline take turns on the device, each with weights of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.common import Row
from benchmarks.gpu.diffsynth_dit import PlainDiT, manage
from benchmarks.gpu.fp8 import cast_to_fp8, store_in_fp8
from benchmarks.gpu.shared import (
    MODELS,
    SIZES,
    Measured,
    Recorder,
    VideoSize,
    free,
    inputs_for,
    measured,
    parser,
    random_dit,
    recorder,
    stepping,
)
from benchmarks.gpu.streams import StreamedDiT, plan_for, plan_text
from diffsynth.models.wan.dit import WanDiT
from diffsynth.vram_management.plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class Configuration:
    """A row of the table."""

    storage: str
    num_persistent: int | None  # parameters that stay on the device; None: all

    def label(self, model: str, size: VideoSize) -> str:
        kept = "all" if self.num_persistent is None else f"{self.num_persistent:.3g}"
        return f"DiT {model} {size.name}: {self.storage}, {kept} parameters stay"


STORAGES = {"bf16": (None, 7_000_000_000, 0), "fp8": (None, 0)}
TOY_STORAGES = {"bf16": (None, 1_500_000, 0), "fp8": (None, 0)}


class Table:
    """Both sides of every row."""

    def __init__(self, model: str, size: VideoSize, out: Recorder, repeats: int) -> None:
        self.model, self.size, self.out, self.repeats = model, size, out, repeats
        self.found: dict[tuple[Configuration, str], Measured] = {}
        self.plans: dict[Configuration, MemoryPlan] = {}

    def run(self, storage: str, numbers: tuple[int | None, ...]) -> None:
        """One storage: the baseline first, then ours, then the rows."""
        rows = [Configuration(storage, number) for number in numbers]
        for side, work in (("DiffSynth's way", self._theirs), ("ours", self._ours)):
            self.out.attempt(f"{rows[0].label(self.model, self.size)}: {side}", partial(work, rows))
            free(self.out.device)
        for row in rows:
            self._add(row)

    def _theirs(self, rows: list[Configuration]) -> None:
        device = self.out.device
        dit = random_dit(self.model, device)
        inputs = inputs_for(dit, self.size, device)
        peer = cast_to_fp8(dit) if rows[0].storage == "fp8" else PlainDiT.sharing(dit)
        latents = inputs.latents.to(dit.dtype)
        del dit

        def step() -> list[torch.Tensor]:
            return [peer(latents, inputs.timestep, text) for text in inputs.texts]

        for row in rows:
            manage(peer, device, row.num_persistent)
            # A step of it takes up to half a minute: only the first row is warmed up.
            work = partial(measured, step, device, repeats=1, warmup=int(row is rows[0]))
            self._keep(row, "DiffSynth's way", self.out.attempt(row.label(self.model, self.size), work))

    def _ours(self, rows: list[Configuration]) -> None:
        device = self.out.device
        dit = random_dit(self.model, device)
        if rows[0].storage == "fp8":
            store_in_fp8(dit)
        for row in rows:
            self.plans[row] = plan_for(dit, self.size, device, num_persistent=row.num_persistent)
        whole = [row for row in rows if self.plans[row].networks["dit"].where != "streamed"]
        for row in whole:
            self._keep(
                row, "ours", self.out.attempt(row.label(self.model, self.size), partial(self._step, dit, row))
            )
        streamed = StreamedDiT(dit, device)
        try:
            for row in rows:
                if row not in whole:
                    network = self.plans[row].networks["dit"]
                    streamed.arrange(network.resident_blocks, network.num_slots)
                    work = partial(self._step, dit, row)
                    self._keep(row, "ours", self.out.attempt(row.label(self.model, self.size), work))
        finally:
            streamed.close()

    def _step(self, dit: WanDiT, row: Configuration) -> Measured:
        plan, inputs = self.plans[row], inputs_for(dit, self.size, self.out.device)
        dit.ffn_chunk_tokens = plan.ffn_chunk_tokens
        step = stepping(dit, inputs, 2, interleaves=plan.interleaves_branches, keeps_keys=plan.keeps_keys)
        return measured(step, self.out.device, repeats=self.repeats)

    def _keep(self, row: Configuration, side: str, found: Measured | None) -> None:
        if found is not None:
            self.found[row, side] = found

    def _add(self, row: Configuration) -> None:
        ours, theirs = (self.found.get((row, side)) for side in ("ours", "DiffSynth's way"))
        if ours is None:
            return
        label, name = row.label(self.model, self.size), "DiffSynth's way" if theirs else ""
        goal = ">= 2.2" if (row.storage, row.num_persistent) == ("bf16", 0) else ""
        self.out.add(
            Row(
                figure=f"{label}, step", unit="s", ours=ours.seconds, peer_name=name,
                peer=theirs.seconds if theirs else (), goal=goal, notes=plan_text(self.plans[row]),
            )
        )  # fmt: skip
        self.out.add(
            Row(
                figure=f"{label}, step, peak", unit="GB", ours=[ours.peak_gb], peer_name=name,
                peer=[theirs.peak_gb] if theirs else (),
                notes=f"the plan says {self.plans[row].peak_bytes / 1e9:.2f} GB",
            )
        )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="14B", choices=tuple(MODELS))
    arguments.add_argument("--size", default="480P", choices=tuple(SIZES))
    arguments.add_argument("--storages", default="bf16,fp8")
    words = sys.argv[1:] if words is None else words
    given = arguments.parse_args(words)
    if given.toy:
        given.model = given.size = "toy"
    storages = TOY_STORAGES if given.toy else STORAGES
    if unknown := set(given.storages.split(",")) - set(storages):
        arguments.error(f"--storages: {', '.join(sorted(unknown))} is unknown; known: {', '.join(storages)}.")
    table = Table(given.model, SIZES[given.size], recorder("v1_configurations", given, words), given.repeats)
    with torch.no_grad():
        for storage in given.storages.split(","):
            table.run(storage, storages[storage])


if __name__ == "__main__":
    main()

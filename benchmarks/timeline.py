"""Draw what the copy engine and the compute do during two steps, as docs/memory_timeline.svg.

    python benchmarks/timeline.py docs/memory_timeline.svg

The order of events is that of `BlockStream`; durations are given (a block's copy and its compute), so that
the picture shows the scheme and not a machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from diffsynth.vram_management.copiers import Mark, Source, Transfer
from diffsynth.vram_management.streaming import BlockStream

BLOCKS, RESIDENT, STEPS = 8, (3,), 2
COPY_S, COMPUTE_S = 0.8, 1.0
SCALE, LEFT, HEIGHT, TOP = 44, 90, 30, 34  # pixels per second, and of the rows
COLOURS = ("#4c78a8", "#f58518", "#54a24b")


@dataclass
class GivenTimes:
    """A copy engine and a compute whose times are given, not measured, in seconds; notes what works when."""

    copy_s: float
    compute_s: float
    compute_at: float = 0.0
    copy_at: float = 0.0
    bars: list[tuple[str, float, float, str]] = field(default_factory=list)  # row, from, to, label
    slots: dict[int, int] = field(default_factory=dict)

    def mark(self) -> Mark:
        passed = self.compute_at

        def wait() -> None:
            self.copy_at = max(self.copy_at, passed)

        return wait

    def fetch(self, target: Tensor, source: Source, start: int, stop: int, free: Mark) -> Transfer:
        free()
        source.read_into(target, start, stop)
        slot = self.slots.setdefault(target.data_ptr(), len(self.slots))
        label = f"{float(target[:4].view(torch.float32)):g}"  # the block's first number
        self.bars.append((f"slot {slot}", self.copy_at, self.copy_at + self.copy_s, label))
        self.copy_at += self.copy_s
        return _Arrival(self, self.copy_at)

    def close(self) -> None:
        pass

    def compute(self, visit: Iterator[nn.Module]) -> None:
        """One pass over blocks as they come."""
        for index, _ in enumerate(visit):
            self.bars.append(("compute", self.compute_at, self.compute_at + self.compute_s, str(index)))
            self.compute_at += self.compute_s


@dataclass
class _Arrival:
    clock: GivenTimes
    at: float

    def wait(self) -> None:
        self.clock.compute_at = max(self.clock.compute_at, self.at)


def events() -> list[tuple[str, float, float, str]]:
    """Run two steps of blocks that hold their own number."""
    blocks = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(BLOCKS)).requires_grad_(False)
    for index, block in enumerate(blocks):
        block.weight.fill_(float(index))
    clock = GivenTimes(COPY_S, COMPUTE_S)
    stream = BlockStream(
        list(blocks), device=torch.device("cpu"), resident=RESIDENT, host="pageable", copier=clock
    )
    for _ in range(STEPS):
        clock.compute(stream(blocks))
    return clock.bars


def svg(bars: list[tuple[str, float, float, str]]) -> str:
    """One row for the compute, one for the copies into each slot."""
    rows = ["compute", *sorted({row for row, *_ in bars if row != "compute"})]
    end = max(to for _, _, to, _ in bars)
    width, height = int(LEFT + end * SCALE + 10), TOP + len(rows) * (HEIGHT + 6) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="8" y="20">Two steps: blocks compute while the next ones travel; '
        f"block {RESIDENT[0]} stays on the device</text>",
    ]
    for number, row in enumerate(rows):
        y = TOP + number * (HEIGHT + 6)
        label = row if row == "compute" else f"copy, {row}"
        parts.append(f'<text x="8" y="{y + 20}">{label}</text>')
        for _, start, to, text in (bar for bar in bars if bar[0] == row):
            x, w = LEFT + start * SCALE, (to - start) * SCALE - 1.5
            stays = row == "compute" and int(text) in RESIDENT
            colour = "#b8b8b8" if stays else COLOURS[number % len(COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{HEIGHT}" rx="3" fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{x + w / 2:.1f}" y="{y + 20}" text-anchor="middle" fill="white">{text}</text>'
            )
    parts.append(f'<text x="{LEFT}" y="{height - 8}">time; numbers are blocks</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(events()), encoding="utf-8")

"""All GPU benchmarks in one command, in parts, within so many minutes.

    python -m benchmarks.gpu.all --minutes 9 --out DIR                  # the five parts that tell most
    python -m benchmarks.gpu.all --minutes 9 --out DIR --parts 720P,v1  # what the first had no time for
    python -m benchmarks.gpu.all --toy --out DIR                        # toy sizes, on a CPU too

Each part is a process of its own: one that fails or hangs does not end the others. A part that is not
expected to finish in the time that is left is put off; the last lines name those parts. Rows are written
into DIR as they are found, one file per script, so that a part that is cut off keeps what it had.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One call of one script."""

    name: str
    script: str
    words: tuple[str, ...] = ()
    expected_s: float  # on an H200, estimated from floors and copy rates; --slower scales it


# By what is learned from each. The first five are what fits into nine minutes: short, few repeats.
PARTS = (
    Part(name="480P", script="dit", words=("--groups", "ours,floor,peers", "--repeats", "2"), expected_s=100),
    Part(  # what a card with less memory than the weights meets
        name="streamed",
        script="dit",
        words=("--groups", "streamed,few,offloaded", "--repeats", "2"),
        expected_s=140,
    ),
    Part(name="fp8", script="fp8", words=("--repeats", "2"), expected_s=105),
    Part(name="vae", script="vae", words=("--repeats", "2"), expected_s=75),
    Part(
        name="train",
        script="train_step",
        words=("--models", "14B", "--groups", "ours,streamed", "--repeats", "1"),
        expected_s=115,
    ),
    Part(
        name="720P",
        script="dit",
        words=("--sizes", "720P", "--groups", "ours,floor,streamed", "--repeats", "1"),
        expected_s=230,
    ),
    Part(name="experts", script="experts", words=("--repeats", "1"), expected_s=160),
    Part(name="v1", script="v1_configurations", words=("--repeats", "1"), expected_s=210),
    Part(
        name="train-peers",
        script="train_step",
        words=("--groups", "ours,theirs", "--repeats", "1"),
        expected_s=170,
    ),
)


def choose(parts: Sequence[Part], seconds: float, slower: float) -> tuple[list[Part], list[Part]]:
    """Those that are expected to fit in the time, in their order, and the rest."""
    now, later, left = [], [], seconds
    for part in parts:
        if part.expected_s * slower <= left:
            now.append(part)
            left -= part.expected_s * slower
        else:
            later.append(part)
    return now, later


def named(text: str) -> list[Part]:
    """Parts by name, with commas; in the order given."""
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; known: {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def command_of(part: Part, given: argparse.Namespace) -> list[str]:
    words = [*part.words, *(["--toy", "--repeats", "1"] if given.toy else [])]
    words += ["--commit", given.commit] if given.commit else []
    words += ["--device", given.device] if given.device else []
    out = (given.out / f"gpu_{part.script}.jsonl").resolve()
    return [sys.executable, "-m", f"benchmarks.gpu.{part.script}", *words, "--out", str(out)]


def run(part: Part, given: argparse.Namespace, seconds: float) -> str:
    """Run one part for at most so long; how it ended, in words."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    try:
        code = subprocess.run(
            command_of(part, given), cwd=ROOT, env=environment, timeout=seconds, check=False
        ).returncode
        ended = "done" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        ended = "cut off by the time limit"
    return f"{ended} after {time.monotonic() - start:.0f} s"


def main(words: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    made.add_argument("--out", type=Path, required=True, help="folder for the rows")
    made.add_argument("--parts", type=named, default=list(PARTS), help=", ".join(p.name for p in PARTS))
    made.add_argument("--slower", type=float, default=1.0, help="how much slower than an H200 this GPU is")
    made.add_argument("--device", help="default: cuda if there is one, else cpu")
    made.add_argument("--commit", help="written into the rows; default: what git says")
    made.add_argument("--toy", action="store_true", help="toy sizes")
    given = made.parse_args(words)
    end = time.monotonic() + 60 * given.minutes
    waiting, endings = list(given.parts), {}
    while True:
        # Chosen anew each time: a part that took less than expected leaves room for another.
        chosen, _ = choose(waiting, end - time.monotonic(), given.slower * (0.1 if given.toy else 1.0))
        if not chosen:
            break
        waiting.remove(chosen[0])
        print(f"== {chosen[0].name}", flush=True)
        endings[chosen[0].name] = run(chosen[0], given, end - time.monotonic())
    for name, ending in endings.items():
        print(f"{name}: {ending}")
    if waiting:
        print(f"no time for: --parts {','.join(part.name for part in waiting)}")
    return 0 if all(ending.startswith("done") for ending in endings.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""What every benchmark shares: interleaved timing, a machine's description, rows of results.

A row compares ours with a peer that was measured in the same run, turn by turn (A B A B ...), so that what
else the machine does falls on both. ``ratio`` is peer / ours: above 1 ours is faster, or needs less.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: ours, and a peer's when there is one."""

    figure: str
    unit: str
    ours: Sequence[float]
    peer_name: str = ""
    peer: Sequence[float] = ()
    goal: str = ""  # in words
    notes: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """peer / ours, of the medians."""
        return median(self.peer) / median(self.ours) if self.peer and median(self.ours) else None


def interleaved(
    works: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each work, A B A B ..., after ``warmup`` rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    for turn in range(warmup + repeats):
        for name, work in works.items():
            start = time.perf_counter()
            result = work()
            spent = time.perf_counter() - start
            del result
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def milliseconds(seconds: Sequence[float]) -> list[float]:
    return [1000 * value for value in seconds]


def machine() -> dict[str, object]:
    """CPU model, cores, RAM and versions; no paths, no names."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "diffusers": installed("diffusers"),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> dict[str, object]:
    """The commit and whether the package differed from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    is_dirty = bool(git("status", "--porcelain", "--", "diffsynth"))
    return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": is_dirty}


def command() -> str:
    """How the script was called, with paths cut to their last part."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 6), "min": round(min(values), 6), "max": round(max(values), 6)}


def as_object(row: Row, about: Mapping[str, object]) -> dict[str, object]:
    """One line of a results file."""
    return {
        **about,
        "figure": row.figure,
        "unit": row.unit,
        "ours": spread(row.ours),
        "repeats": len(row.ours),
        "peer_name": row.peer_name or None,
        "peer": spread(row.peer) if row.peer else None,
        "ratio": None if row.ratio is None else round(row.ratio, 3),
        "goal": row.goal or None,
        "notes": row.notes,
        **row.extra,
    }


def report(name: str, rows: Sequence[Row], out: Path | None, threads: int | None = None) -> None:
    """Print a table and append the rows to ``out`` (default: benchmarks/results/NAME.jsonl)."""
    print(table(rows))
    file = out or RESULTS / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "command": command(),
        **commit(),
        "machine": machine(),
        "threads": threads or os.cpu_count(),
    }
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(as_object(row, about)) + "\n" for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Rows for people, in Markdown."""
    head = ("figure", "ours", "peer", "peer / ours", "goal", "notes")
    body = [(r.figure, shown(r.ours, r.unit), peer_shown(r), ratio_shown(r), r.goal, r.notes) for r in rows]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *body)
    ]
    return "\n".join([lines[0], "-|-".join("-" * width for width in widths), *lines[1:]])


def shown(values: Sequence[float], unit: str) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g} {unit}"
    return f"{median(values):.4g} ({min(values):.4g}-{max(values):.4g}) {unit}"


def peer_shown(row: Row) -> str:
    return f"{row.peer_name}: {shown(row.peer, row.unit)}" if row.peer else "-"


def ratio_shown(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that all scripts share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="file to append rows to; default: results/NAME.jsonl")
    made.add_argument("--repeats", type=int, default=7, help="turns that are counted, after a warm-up")
    made.add_argument("--threads", type=int, help="threads of torch; default: all cores")
    return made


def set_threads(count: int | None) -> int:
    """Let torch use ``count`` threads, or as many as there are cores."""
    import torch

    torch.set_num_threads(count or os.cpu_count() or 1)
    return torch.get_num_threads()


def memory_kib(field_name: str) -> int:
    """A field of /proc/self/status in KiB: RssAnon, VmRSS, VmHWM."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field_name}:"))


def run_child(script: str, *words: str) -> dict[str, float]:
    """A script of this folder in a fresh interpreter; its last line of output is a JSON object."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(words)} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))

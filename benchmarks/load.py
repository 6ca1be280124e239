"""Time and memory from a file to ready weights, against torch, safetensors, diffusers; ``diffsynth inspect``.

    python benchmarks/load.py FOLDER  # writes what it needs into FOLDER (9 GB) unless it is there
    python benchmarks/load.py FOLDER --what dit-toy  # seconds

Each measurement is a fresh process. The clock starts when the interpreter, torch and the loader's own
module are imported and stops when every weight can be used; memory is what the process gained in anonymous
pages (RssAnon), which excludes pages of the file itself. The page cache is warm. Views of a mapped file are
read when they are first used: the rows with "touched" read one element of every page of every weight before
the clock stops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import GB, ROOT, Row, memory_kib, parser, report, run_child

PEERS_PTH = ("torch.load",)
PEERS_SAFETENSORS = ("safetensors.load_file", "diffusers from_pretrained", "diffusers from_single_file")
MIDDLE = (  # a small process in between: the peak of a child is never below that of its parent
    "import json, resource, subprocess, sys, time; start = time.perf_counter();"
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); spent = time.perf_counter() - start;"
    "print(json.dumps({'seconds': spent, 'peak_kib': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,"
    "'status': done.returncode}))"
)


def loader(name: str, file: Path, twin: Path, dtype_name: str) -> Callable[[], object]:
    """The work to be timed; everything it imports is imported here."""
    import torch

    dtype = getattr(torch, dtype_name)
    if name == "ours":
        from diffsynth.models.model_manager import ModelManager

        return lambda: ModelManager(torch_dtype=dtype, device="cpu").load_models([file]).model[0]
    if name == "torch.load":
        return lambda: _cast(torch.load(file, map_location="cpu", weights_only=True), dtype)
    if name == "safetensors.load_file":
        from safetensors.torch import load_file

        return lambda: _cast(load_file(file), dtype)
    import diffusers

    config = json.loads((twin.parent / "config.json").read_text())
    peer_class = getattr(diffusers, config["_class_name"])
    if name == "diffusers from_pretrained":
        return lambda: peer_class.from_pretrained(twin.parent, torch_dtype=dtype)
    return lambda: peer_class.from_single_file(str(twin), config=str(twin.parent), torch_dtype=dtype)


def _cast(weights: dict, dtype: object) -> dict:
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def touch(loaded: object) -> float:
    """Read one element of every page."""
    weights = loaded.values() if isinstance(loaded, dict) else loaded.parameters()  # type: ignore[attr-defined]
    return sum(float(t.flatten()[:: max(1, 4096 // t.element_size())].float().sum()) for t in weights)


def child(name: str, file: Path, twin: Path, dtype_name: str, touched: bool) -> None:
    work = loader(name, file, twin, dtype_name)
    before, start = memory_kib("RssAnon"), time.perf_counter()
    loaded = work()
    if touched:
        touch(loaded)
    spent = time.perf_counter() - start
    print(json.dumps({"seconds": spent, "anon_gb": (memory_kib("RssAnon") - before) * 1024 / GB}))


def measure(
    what: str,
    names: Sequence[str],
    file: Path,
    twin: Path,
    *,
    dtype: str,
    touched: bool,
    repeats: int,
    goals: tuple[str, str],
) -> list[Row]:
    """Rows of ours against each peer, turn by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names:
            words = ["--child", name, "--file", str(file), "--twin", str(twin), "--dtype", dtype]
            got = run_child("load.py", str(file.parent), *words, *(["--touched"] if touched else []))
            if turn:
                seconds[name].append(got["seconds"])
                memory[name].append(got["anon_gb"])
    how = f"{what} {file.suffix} as {dtype}{', touched' if touched else ''}"
    rows = []
    for peer in names[1:]:
        rows.append(
            Row(
                figure=f"load {how}: time",
                unit="s",
                ours=seconds["ours"],
                peer_name=peer,
                peer=seconds[peer],
                goal=goals[0],
            )
        )
        rows.append(
            Row(
                figure=f"load {how}: anonymous memory",
                unit="GB",
                ours=memory["ours"],
                peer_name=peer,
                peer=memory[peer],
                goal=goals[1],
            )
        )
    return rows


def inspect_rows(file: Path, repeats: int) -> list[Row]:
    """The whole process of ``diffsynth inspect`` on a file of which only the header is real."""
    if (ROOT / "diffsynth" / "__main__.py").exists():
        call, how = [sys.executable, "-m", "diffsynth", "inspect", str(file)], "python -m diffsynth inspect"
    else:
        code = f"from diffsynth.cli.inspect import run_inspect; run_inspect([{str(file)!r}], False)"
        call, how = (
            [sys.executable, "-c", code],
            "run_inspect in python -c; there is no diffsynth/__main__.py yet",
        )
    runs = []
    for _ in range(repeats + 1):
        done = subprocess.run(
            [sys.executable, "-c", MIDDLE, *call], capture_output=True, text=True, cwd=ROOT, check=True
        )
        runs.append(json.loads(done.stdout))
    if any(run["status"] for run in runs):
        raise RuntimeError(f"{how} failed")
    size = f"{file.stat().st_size / GB:.0f} GB, sparse"
    return [
        Row(
            figure="inspect: whole process",
            unit="s",
            ours=[r["seconds"] for r in runs[1:]],
            goal="< 0.4 s",
            notes=f"{how}; {size}",
        ),
        Row(
            figure="inspect: peak RSS",
            unit="MB",
            ours=[r["peak_kib"] * 1024 / 1e6 for r in runs[1:]],
            goal="< 100 MB",
            notes=size,
        ),
    ]


def prepared(folder: Path, what: str, *words: str) -> Path:
    """A checkpoint, written in a process of its own if it is not there (this one stays free of torch)."""
    layout, kind = (
        ("diffusers" if "diffusers" in words else "official"),
        ("pth" if "pth" in words else "safetensors"),
    )
    place = folder / (what if layout == "official" else f"{what}-diffusers")
    file = place / ("model.pth" if kind == "pth" else "diffusion_pytorch_model.safetensors")
    if not file.exists():
        call = [
            sys.executable,
            str(ROOT / "benchmarks" / "make_checkpoint.py"),
            str(folder),
            "--what",
            what,
            *words,
        ]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ})
    return file


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path, help="where checkpoints are, or are written")
    arguments.add_argument("--what", default="dit-1.3b", choices=("dit-1.3b", "dit-toy", "vae", "vae-toy"))
    arguments.add_argument("--only", choices=("safetensors", "pth", "inspect"))
    for hidden in ("--child", "--file", "--twin", "--dtype"):
        arguments.add_argument(hidden, help=argparse.SUPPRESS)
    arguments.add_argument("--touched", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args(words)
    if given.child:
        child(given.child, Path(given.file), Path(given.twin), given.dtype, given.touched)
        return
    rows: list[Row] = []
    stored = "float32" if given.what.startswith("vae") else "bfloat16"
    twin = prepared(given.folder, given.what, "--layout", "diffusers")
    if given.only in (None, "safetensors"):
        file, names = prepared(given.folder, given.what), ("ours", *PEERS_SAFETENSORS)
        rows += measure(
            given.what,
            names,
            file,
            twin,
            dtype=stored,
            touched=False,
            repeats=given.repeats,
            goals=("<= 0.1 s", "<= 0.2 GB"),
        )
        rows += measure(
            given.what,
            names[:3],
            file,
            twin,
            dtype=stored,
            touched=True,
            repeats=given.repeats,
            goals=("", ""),
        )
        other = "float32" if stored == "bfloat16" else "bfloat16"
        rows += measure(
            given.what,
            names[:3],
            file,
            twin,
            dtype=other,
            touched=False,
            repeats=given.repeats,
            goals=("", ""),
        )
    if given.only in (None, "pth"):
        file, names = prepared(given.folder, given.what, "--format", "pth"), ("ours", *PEERS_PTH)
        rows += measure(
            given.what,
            names,
            file,
            twin,
            dtype=stored,
            touched=False,
            repeats=given.repeats,
            goals=("<= 0.12 s", "<= 0.2 GB"),
        )
    if given.only in (None, "inspect"):
        rows += inspect_rows(prepared(given.folder, "dit-14b", "--sparse"), given.repeats)
    report("load", rows, given.out)


if __name__ == "__main__":
    main()

"""Time of ``diffsynth dataset check`` on many tiny clips, against a bare loop that only opens the files.

    python benchmarks/dataset_check.py  # 10000 clips
    python benchmarks/dataset_check.py --clips 500 --repeats 3  # a look

Clips are hard links of a few videos that differ in length (copies where the disk has no links), with a table
of captions: each is opened, its header read, and its frames planned. The bare loop calls ``av.open`` on each
file, one after the other; "threads" does so in as many threads as the check uses. The page cache is warm.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np

from benchmarks.common import Row, interleaved, parser, report
from diffsynth.training.dataset.config import DatasetConfig
from diffsynth.training.dataset.planning import MAX_WORKERS, plan_dataset
from diffsynth.training.dataset.report import report_of, to_text
from diffsynth.video import save_video

LENGTHS = (5, 9, 13, 17)  # frames of the originals
HEIGHT, WIDTH = 64, 96
GOAL_S = 60.0  # for 10,000 clips on 2 cores
GOAL_CLIPS = 10_000


def make_dataset(root: Path, count: int) -> Path:
    """``count`` clips with a table, in ``root``."""
    train = root / "train"
    train.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (max(LENGTHS), HEIGHT, WIDTH, 3), dtype=np.uint8)
    originals = []
    for length in LENGTHS:
        originals.append(root / f"{length}.mp4")
        save_video(noise[:length], originals[-1], fps=16)
    lines = ["file_name,text"]
    for number in range(count):
        name = f"{number:06d}.mp4"
        original = originals[number % len(originals)]
        try:
            os.link(original, train / name)
        except OSError:
            shutil.copy(original, train / name)
        lines.append(f'{name},"clip {number}, of noise"')
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def open_bare(file: Path) -> int:
    with av.open(str(file)) as container:
        return container.streams.video[0].frames


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--clips", type=int, default=GOAL_CLIPS)
    arguments.add_argument("--workers", type=int, help="threads of the check; default: its own choice")
    told = arguments.parse_args()
    workers = told.workers or min(MAX_WORKERS, (os.cpu_count() or 1) * 2)
    with tempfile.TemporaryDirectory() as folder:
        root = make_dataset(Path(folder) / "data", told.clips)
        files = sorted((root / "train").iterdir())
        config = DatasetConfig(path=str(root), num_frames=(5, 13), sizes=((HEIGHT, WIDTH),))

        def check() -> None:
            plan = plan_dataset([config], model_fps=16, workers=workers)
            assert len(plan.clips) == told.clips, plan.dropped[:3]
            to_text(report_of(plan))

        def bare() -> None:
            assert sum(map(open_bare, files)) > 0

        def threads() -> None:
            with ThreadPoolExecutor(max_workers=workers) as pool:
                assert sum(pool.map(open_bare, files)) > 0

        works = {"check": check, "av.open": bare, "av.open, threads": threads}
        seconds = interleaved(works, repeats=told.repeats)
        start = time.process_time()
        check()
        cpu_ms = 1000 * (time.process_time() - start) / told.clips  # what a busy machine does not change
    ours = [1000 * spent / told.clips for spent in seconds["check"]]
    goal = f"<= {1000 * GOAL_S / GOAL_CLIPS:g} ms ({GOAL_S:g} s for {GOAL_CLIPS} on 2 cores)"
    rows = [
        Row(
            figure=f"dataset check, {told.clips} clips", unit="ms/clip", ours=ours, peer_name=name,
            peer=[1000 * spent / told.clips for spent in seconds[name]], goal=goal,
            notes=f"{workers} threads, {cpu_ms:.2f} ms of CPU per clip",
            extra={"clips": told.clips, "cpu_ms": round(cpu_ms, 3)},
        )
        for name in ("av.open", "av.open, threads")
    ]  # fmt: skip
    report("dataset_check", rows, told.out, workers)


if __name__ == "__main__":
    main()

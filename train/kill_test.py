"""Kill a run at random moments, let it go on, and compare it with one that nobody killed.

    python train/kill_test.py train/recipes/tiny_lora.yaml --times 20

Each time a fresh data_process, and then a fresh training, gets SIGKILL at a moment drawn from the time that
it takes undisturbed, and is started again. The cache must be that of the undisturbed run, tensor by tensor;
the loss of every step must equal its loss to 1e-6, each step must stand once in the CSV, the exported
weights must be equal, and no file may be cut off. Same machine and number of threads for all.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffsynth.portable import kill_with_children

TOLERANCE = 1e-6  # relative, of the loss


def command(config: Path, output: Path, cache: Path, task: str, flags: Sequence[str]) -> list[str]:
    """What a user would type."""
    return [
        sys.executable, "-m", "diffsynth", "train", str(config), "--quiet", "--run.task", task,
        "--run.output", str(output), "--cache.cache_dir", str(cache), *flags,
    ]  # fmt: skip


def run_whole(line: Sequence[str]) -> float:
    """Run to the end, and return the seconds that it took."""
    start = time.monotonic()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def run_and_kill(line: Sequence[str], after_s: float) -> bool:
    """Kill a run and its workers after some seconds; whether it had not ended by itself."""
    process = subprocess.Popen(
        line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        kill_with_children(process)
        return True
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} ended with status {process.returncode}")
    return False


def check_cache(expected: Path, found: Path) -> None:
    """The same files with the same tensors, and nothing half-written."""
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    own = sorted(path.name for path in found.glob("*.safetensors"))
    assert own == names, f"the cache holds {len(own)} files, expected {len(names)}"
    assert not list(found.glob(".part-*")), "half-written files are left"
    for name in names:
        one, other = load_file(expected / name), load_file(found / name)
        assert one.keys() == other.keys(), name
        assert all(torch.equal(one[key], other[key]) for key in one), f"{name} differs"


def losses(output: Path) -> dict[int, float]:
    """Loss by step of the one run in an output folder; each step stands there once."""
    (path,) = output.glob("lightning_logs/version_*/metrics.csv")
    with path.open(newline="") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    steps = [step for step, _ in rows]
    assert steps == list(range(1, len(rows) + 1)), f"{path} holds the steps {steps}"
    return dict(rows)


def check_training(expected: Path, found: Path) -> None:
    """The same losses and weights, and every checkpoint whole."""
    wanted, own = losses(expected), losses(found)
    assert wanted.keys() == own.keys(), f"{len(own)} steps, expected {len(wanted)}"
    for step, loss in wanted.items():
        assert abs(own[step] - loss) <= TOLERANCE * abs(loss), f"step {step}: {own[step]} and {loss}"
    for path in found.rglob("*.ckpt"):
        assert not path.name.startswith("."), f"{path} is left"
        torch.load(path, weights_only=True)
    exports, others = last_exports(expected), last_exports(found)
    assert exports.keys() == others.keys(), f"exported are {sorted(others)}, expected {sorted(exports)}"
    for name, path in exports.items():
        one, other = load_file(path), load_file(others[name])
        assert one.keys() == other.keys(), name
        assert all(torch.equal(one[key], other[key]) for key in one), f"the weights of {name} differ"


def last_exports(output: Path) -> dict[str, Path]:
    """What was exported with the last checkpoint, by file name: one file, or one for each of two experts."""
    checkpoint = max(output.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    found = {path.name: path for path in checkpoint.parent.glob(f"{checkpoint.stem}*.safetensors")}
    assert found, f"nothing is exported beside {checkpoint}"
    return found


def killed_run(line: Sequence[str], whole_s: float, chance: random.Random) -> int:
    """Kill once at a random moment, then start again until the run ends; returns how often it was started."""
    after_s = chance.uniform(0.0, whole_s)
    if not run_and_kill(line, after_s):
        return 1
    run_whole(line)
    return 2


def main() -> None:
    """Read the command line and test."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("config", type=Path, nargs="?", default=Path("train/recipes/tiny_lora.yaml"))
    parser.add_argument("--times", type=int, default=20, help="kills of data_process, and of training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("kill_test"), help="for all that is written")
    parser.epilog = "What stands behind -- are more flags of diffsynth train."
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given, flags = parser.parse_args(words[:end]), words[end + 1 :]
    chance = random.Random(given.seed)
    reference, cache = given.folder / "reference", given.folder / "reference_cache"
    resumed = [*flags, "--run.resume", "latest"]
    encode_s = run_whole(command(given.config, reference, cache, "data_process", flags))
    train_s = run_whole(command(given.config, reference, cache, "train", resumed))
    print(f"undisturbed: data_process {encode_s:.1f} s, training {train_s:.1f} s")
    for number in range(given.times):
        own = given.folder / f"cache_{number}"
        line = command(given.config, given.folder / f"encode_{number}", own, "data_process", flags)
        starts = killed_run(line, encode_s, chance)
        check_cache(cache, own)
        print(f"data_process {number + 1}: {starts} starts, cache equal")
    for number in range(given.times):
        output = given.folder / f"train_{number}"
        starts = killed_run(command(given.config, output, cache, "train", resumed), train_s, chance)
        check_training(reference, output)
        print(f"training {number + 1}: {starts} starts, losses and weights equal")


if __name__ == "__main__":
    main()

"""Kills runs of ``diffsynth generate`` at random moments, goes on with what lies there, compares every byte.

``python -m tests.kill_generate --kills 40`` takes about ten seconds a kill on one core. A kill is SIGKILL to
a run with ``--save-every 1``. What comes then is what a user would type: ``generate --resume`` where a file
of steps lies, ``decode`` for each file of latents, the same line where nothing was kept.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

COMMAND = (sys.executable, "-m", "diffsynth")
SMALL = ("--num-frames", "9", "--steps", "5", "--seed", "3", "--save-every", "1", "--device", "cpu")
POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line, without ``generate`` and the prompt."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run makes that nobody disturbs, and when.

    Moments are counted in files that come and change, for on a busy machine seconds say little.
    """

    files: dict[str, bytes]
    changes_s: tuple[float, ...]  # when files came and changed: steps, latents, the video's parts, its name
    end_s: float

    def moment(self, random_numbers: random.Random) -> tuple[int, float]:
        """So many changes, and seconds behind the last of them, anywhere between start and end."""
        count = random_numbers.randrange(len(self.changes_s) + 1)
        times = (0.0, *self.changes_s, self.end_s)
        return count, random_numbers.uniform(0.0, times[count + 1] - times[count])


class Watch:
    """Counts how often a file of a run has come or changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[tuple[str, int]] = set()

    def count(self) -> int:
        """So far."""
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if entry.name.startswith(".part-") and entry.name.endswith(".mp4"):
                    self._seen.add((entry.name, 0))
                elif entry.name[0] != "." and entry.name != "cache":
                    self._seen.add((entry.name, entry.stat().st_mtime_ns))
        return len(self._seen)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One kill."""

    case: str
    moment: str
    found: str  # what lay there
    typed: str  # what was typed then
    is_equal: bool
    why: str = ""


def cases(folder: Path) -> list[Case]:
    """Lines of all samplers, one expert and two, LoRAs, batches, previews and videos to start from."""
    from tests.pairs import write_tiny_pair

    pair = ("--model", str(write_tiny_pair(folder / "pair")), "--dtype", "float32")
    lora = ("--lora", f"{write_lora(folder / 'style.safetensors')}:0.7")
    run(folder, "generate", "a blue star", "--num-frames", "9", "--steps", "2", "--out", "in.mp4", "--quiet")
    video = ("--input-video", str(folder / "in.mp4"), "--denoising-strength", "0.8")
    told = {
        "euler": ("--sampler", "euler"),
        "unipc, 2 videos": ("--sampler", "unipc", "--num-videos-per-prompt", "2"),
        "dpm++, LoRA": ("--sampler", "dpm++", *lora),
        "two experts, euler": (*pair, "--sampler", "euler"),
        "two experts, unipc, LoRA": (*pair, "--sampler", "unipc", *lora),
        "two experts, dpm++": (*pair, "--sampler", "dpm++", "--sigma-shift", "5"),
        "unipc from a video": ("--sampler", "unipc", *video),
        "preview": ("--preview", "--num-videos-per-prompt", "2"),
        "v1, kept latents": ("--precision", "v1", "--keep-latents"),
    }
    return [Case(name=name, arguments=(*SMALL, *arguments)) for name, arguments in told.items()]


def write_lora(path: Path) -> Path:
    """A LoRA of the tiny Wan that changes what is drawn."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from diffsynth.tiny import tiny_folder

    generator, tensors = torch.Generator().manual_seed(0), {}
    with safe_open(tiny_folder() / "diffusion_pytorch_model.safetensors", "pt") as weights:
        for name in list(weights.keys()):
            if name.endswith(("self_attn.q.weight", "ffn.0.weight")):
                rows, columns = weights.get_slice(name).get_shape()
                stem = f"diffusion_model.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
                tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, path)
    return path


def environment(folder: Path) -> dict[str, str]:
    """Of every process: one thread, so that sums have one order, and a cache of its own."""
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "XDG_CACHE_HOME": str(folder / "cache")}
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **own}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )


def begun(folder: Path, case: Case) -> subprocess.Popen[bytes]:
    """A run of a case, in a folder of its own."""
    return subprocess.Popen(
        [*COMMAND, *line_of(case)], cwd=folder, env=environment(folder),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def line_of(case: Case) -> tuple[str, ...]:
    """What the user typed."""
    return ("generate", "a red circle moving right", "--out", "video.mp4", *case.arguments)


def undisturbed(folder: Path, case: Case) -> Expected:
    """Run a case to its end."""
    folder.mkdir()
    watch, changes_s, started = Watch(folder), list[float](), time.monotonic()
    process = begun(folder, case)
    while process.poll() is None:
        changes_s += [time.monotonic() - started] * (watch.count() - len(changes_s))
        time.sleep(POLL_S)
    if process.returncode != 0:
        raise SystemExit(f"{case.name} fails without a kill: {run(folder, *line_of(case)).stderr}")
    if left := [path.name for path in folder.glob("*.steps.safetensors")]:
        raise SystemExit(f"{case.name} leaves {left}")
    return Expected(files=made_in(folder), changes_s=tuple(changes_s), end_s=time.monotonic() - started)


def made_in(folder: Path) -> dict[str, bytes]:
    """Every video and picture, by its name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".mp4", ".png")}


def killed(folder: Path, case: Case, expected: Expected, moment: tuple[int, float]) -> Trial:
    """Kill a run at a moment, and go on."""
    folder.mkdir()
    process, watch = begun(folder, case), Watch(folder)
    while watch.count() < moment[0] and process.poll() is None:
        time.sleep(POLL_S)
    time.sleep(moment[1])
    process.kill()
    process.wait()
    found = what_lies_in(folder)
    typed, why = [], ""
    for arguments in going_on(folder, case, expected):
        done = run(folder, *arguments)
        typed.append(arguments[0] if "--resume" not in arguments else "--resume")
        if done.returncode != 0:
            why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it failed"
    made = made_in(folder)
    differ = [name for name in sorted({*made, *expected.files}) if made.get(name) != expected.files.get(name)]
    left = [p.name for p in folder.glob("*.steps.safetensors")]
    why = why or ", ".join([*(f"{name} differs" for name in differ), *(f"{name} is left" for name in left)])
    return Trial(
        case=case.name, moment=f"{moment[0]} files + {moment[1]:.2f} s", found=found,
        typed=" + ".join(typed) or "nothing", is_equal=not why, why=why,
    )  # fmt: skip


def going_on(folder: Path, case: Case, expected: Expected) -> Iterator[tuple[str, ...]]:
    """What a user types, by what lies there."""
    steps = sorted(folder.glob("*.steps.safetensors"))
    latents = sorted(folder.glob("*.latents.safetensors"))
    videos = {name for name in expected.files if name.endswith(".mp4")}
    if steps:
        yield ("generate", "--resume", steps[0].name)
    elif latents and not all((folder / name).is_file() for name in videos):
        for file in latents:
            name = file.name.split(".")[0] + ".mp4"
            if not (folder / name).is_file():
                yield ("decode", file.name)
    elif any(not (folder / name).is_file() for name in expected.files):
        yield line_of(case)


def what_lies_in(folder: Path) -> str:
    """In words."""
    kinds = Counter(
        "steps" if path.name.endswith(".steps.safetensors")
        else "latents" if path.name.endswith(".latents.safetensors")
        else "part" if path.name.startswith(".part-")
        else path.suffix.removeprefix(".")
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".claim-")
    )  # fmt: skip
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in sorted(kinds.items())) or "-"


def trials(folder: Path, kills: int, seed: int, names: Sequence[str] = ()) -> Iterator[Trial]:
    """Kill so many runs, one case after the other."""
    random_numbers = random.Random(seed)
    chosen = [case for case in cases(folder) if not names or case.name in names]
    expected = {case.name: undisturbed(folder / f"whole-{i}", case) for i, case in enumerate(chosen)}
    for index in range(kills):
        case = chosen[index % len(chosen)]
        place, whole = folder / f"kill-{index}", expected[case.name]
        trial = killed(place, case, whole, whole.moment(random_numbers))
        if trial.is_equal:
            shutil.rmtree(place)
        yield trial


def main() -> None:
    """Kill, print a row for each, and end with status 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", default=[])
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-generate-"))
    failed = 0
    print(
        "| # | line | killed after | lay there | typed | same bytes |\n|---|---|---|---|---|---|", flush=True
    )
    for index, trial in enumerate(trials(folder, given.kills, given.seed, given.case), start=1):
        failed += not trial.is_equal
        row = (index, trial.case, trial.moment, trial.found, trial.typed, trial.why or "yes")
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"{given.kills - failed} of {given.kills}; what failed is in {folder}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

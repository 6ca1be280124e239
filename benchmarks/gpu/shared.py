"""What the GPU benchmarks share: rows written as soon as they are known, timing, peaks, random networks.

A contender that fails (out of memory, a library that is missing) writes a row with its error and makes room
for the next one. Without a GPU everything runs on the CPU at toy size, by the same code.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.common import GB, RESULTS, Row, as_object, commit, machine, memory_kib, peer_shown, shown
from benchmarks.full_size import DIT_1_3B, DIT_14B, TOY_DIT
from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Expert, Experts, Side
from diffsynth.models.wan.dit import WanDiT
from diffsynth.sampling.step import Step

T = TypeVar("T")

DIT_5B: Mapping[str, object] = {
    **DIT_1_3B, "dim": 3072, "in_dim": 48, "out_dim": 48, "ffn_dim": 14336, "num_heads": 24,
}  # fmt: skip
MODELS: Mapping[str, Mapping[str, object]] = {
    "1.3B": DIT_1_3B,
    "5B": DIT_5B,
    "14B": DIT_14B,
    "toy": {**TOY_DIT, "num_layers": 4},
}
TIMESTEP = 875.0
TEXT_TOKENS = 512  # all of them words: peers attend to 512 rows whatever the prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSize:
    """A video, in pixels and frames."""

    name: str
    height: int
    width: int
    num_frames: int


SIZES = {
    "480P": VideoSize(name="480P", height=480, width=832, num_frames=81),
    "720P": VideoSize(name="720P", height=720, width=1280, num_frames=81),
    "480P17": VideoSize(
        name="480P17", height=480, width=832, num_frames=17
    ),  # few tokens: copies take longer
    "toy": VideoSize(name="toy", height=64, width=64, num_frames=5),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of each repeat, and the highest memory of all calls, the warm-up included."""

    seconds: Sequence[float]
    peak_bytes: int

    @property
    def peak_gb(self) -> float:
        return self.peak_bytes / GB


@dataclass
class Recorder:
    """Prints rows and appends them to a file, one by one: a run that is cut off keeps what it had."""

    command: str
    out: Path
    device: torch.device
    commit_name: str | None = None  # where the copy of the repository has no history
    num_errors: int = field(default=0, init=False)

    def add(self, row: Row) -> None:
        """A figure."""
        ratio = "" if row.ratio is None else f"  peer / ours {row.ratio:.3f}"
        peer = f"  {peer_shown(row)}" if row.peer else ""
        goal = f"  goal {row.goal}" if row.goal else ""
        print(
            f"{row.figure}: {shown(row.ours, row.unit)}{peer}{ratio}{goal}  {row.notes}".rstrip(), flush=True
        )
        self._write(as_object(row, self._about))

    def fail(self, figure: str, error: str) -> None:
        """A figure that could not be had, and why."""
        self.num_errors += 1
        print(f"{figure}: no figure, {error}", flush=True)
        none = dict.fromkeys(("unit", "ours", "peer_name", "peer", "ratio", "goal"))
        self._write({**self._about, "figure": figure, **none, "repeats": 0, "notes": "", "error": error})

    def attempt(self, figure: str, work: Callable[[], T]) -> T | None:
        """Run one contender; None when it failed, after a row that says so."""
        try:
            return work()
        except Exception as error:  # whatever a peer or a device does, the others are still measured
            first_line = (str(error).splitlines() or [""])[0][:300]
            # Its frames hold tensors: let them go before the next contender needs the room.
            traceback.clear_frames(error.__traceback__)
            self.fail(figure, f"{type(error).__name__}: {first_line}")
        free(self.device)
        return None

    @cached_property
    def _about(self) -> dict[str, object]:
        return {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
            "command": self.command,
            **self._commit(),
            "machine": {**machine(), **gpu_of(self.device)},
            "threads": torch.get_num_threads(),
        }

    def _commit(self) -> dict[str, object]:
        unknown: dict[str, object] = {"commit": self.commit_name, "dirty": None}
        if self.commit_name:
            return unknown
        try:
            return commit()
        except OSError:  # a machine without git
            return unknown

    def _write(self, line: Mapping[str, object]) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def gpu_of(device: torch.device) -> dict[str, object]:
    """The GPU and its libraries; None of each without one."""
    if device.type != "cuda":
        return {"gpu": None, "cuda": None, "cudnn": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that all GPU benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="file to append rows to; default: results/gpu_NAME.jsonl")
    made.add_argument("--repeats", type=int, default=3, help="calls that are counted, after a warm-up")
    made.add_argument("--device", help="default: cuda if there is one, else cpu")
    made.add_argument("--commit", help="written into the rows; default: what git says")
    made.add_argument("--toy", action="store_true", help="toy sizes: seconds on a CPU")
    return made


def recorder(name: str, given: argparse.Namespace, words: Sequence[str]) -> Recorder:
    """Where the rows of a script go; ``words`` are those of its command line."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    shown_words = [Path(word).name if "/" in word else word for word in words]
    return Recorder(
        command=" ".join(["python -m", f"benchmarks.gpu.{name}", *shown_words]),
        out=given.out or RESULTS / f"gpu_{name}.jsonl",
        device=device,
        commit_name=given.commit,
    )


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what nobody holds of a GPU's memory.

    Pinned host memory stays in torch's cache: the next contender that pins as much takes it over.
    """
    if device.type != "cuda":
        return
    gc.collect()
    synchronise(device)
    torch.cuda.empty_cache()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """One call, between two events of the device where it has them; nothing else is under way."""
    synchronise(device)
    if device.type != "cuda":
        start = time.perf_counter()
        result = work()
        spent = time.perf_counter() - start
        del result
        return spent
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    result = work()
    after.record()
    after.synchronize()
    del result
    return before.elapsed_time(after) / 1000  # type: ignore[no-any-return]


def measured(work: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 1) -> Measured:
    """Call ``work``; the peak is all that torch allocated on a GPU, on the CPU that of the process so far."""
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup):
        seconds_of(work, device)
    seconds = [seconds_of(work, device) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * memory_kib("VmHWM")
    return Measured(seconds=seconds, peak_bytes=peak)


def kernel_seconds(work: Callable[[], object], device: torch.device, *, seconds: float = 0.3) -> float:
    """One kernel alone: the median of three runs that each last about ``seconds`` (one call on the CPU)."""
    seconds_of(work, device)
    once = seconds_of(work, device)
    count = 1 if device.type != "cuda" else min(100, max(3, math.ceil(seconds / max(once, 1e-6))))

    def many() -> None:
        for _ in range(count):
            work()

    return median(seconds_of(many, device) for _ in range(3)) / count


def random_dit(model: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> WanDiT:
    """A DiT with random weights, made on the device tensor by tensor; the host holds none of them."""
    with torch.device("meta"):
        dit = WanDiT.from_config(MODELS[model]).to(dtype)
    dit = dit.to_empty(device=device).eval().requires_grad_(False)
    fill_randomly(dit, device)
    return dit


def fill_randomly(network: nn.Module, device: torch.device) -> None:
    """Gains around 1, all else around 0 with a deviation of 0.02; equal for equal devices."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in network.named_parameters():
        is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight") and tensor.ndim == 1)
        tensor.data.normal_(1.0 if is_gain else 0.0, 0.02, generator=generator)


@dataclass(frozen=True)
class Inputs:
    """What one step is given."""

    latents: Tensor  # (1, C, F, H, W) float32 on the device
    timestep: Tensor  # (1,)
    texts: tuple[Tensor, ...]  # (1, 512, text_dim) for each side of the guidance, on the device
    sides: tuple[Side, ...]
    tokens: int  # L

    @property
    def text(self) -> Tensor:
        """Of the positive side."""
        return self.texts[0]


def inputs_for(dit: WanDiT, size: VideoSize, device: torch.device, num_sides: int = 2) -> Inputs:
    """Random latents of a video of this size, and texts; sizes are taken down to what the patches divide."""
    config = dit.config
    stride = 16 if config.out_dim == 48 else 8
    edges = zip((size.height, size.width), config.patch_size[1:], strict=True)
    height, width = (edge // (stride * patch) * patch for edge, patch in edges)
    shape = ((size.num_frames - 1) // 4 + 1, height, width)
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(1, config.out_dim, *shape, device=device, generator=generator)
    texts = tuple(
        torch.randn(1, TEXT_TOKENS, config.text_dim, device=device, generator=generator).to(dit.dtype)
        for _ in range(num_sides)
    )
    return Inputs(
        latents,
        torch.tensor([TIMESTEP]),
        texts,
        tuple(Side(index=i, conditions=Conditions(text=text)) for i, text in enumerate(texts)),
        math.prod(shape) // math.prod(config.patch_size),
    )


def stepping(
    dit: WanDiT, inputs: Inputs, num_sides: int, *, interleaves: bool = True, keeps_keys: bool = True
) -> Callable[[], list[Tensor]]:
    """Our step, as a generation makes it: text is embedded, and keys kept if they are, by the first call."""
    experts = Experts(Expert(dit=dit), interleaves=interleaves)
    told = Step(index=0, count=1, sigma=TIMESTEP / 1000, timestep=inputs.timestep)

    def step() -> list[Tensor]:
        dit.keeps_keys = keeps_keys
        return experts(inputs.latents, told, inputs.sides[:num_sides])

    return step


def config_of(dit: WanDiT) -> dict[str, object]:
    """Its sizes, as plain values."""
    return asdict(dit.config)

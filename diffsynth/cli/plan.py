"""``diffsynth plan``: what a generation takes, told from headers alone, without torch."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from diffsynth.checkpoints.architecture import Match
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.files import group_files
from diffsynth.checkpoints.pairs import LOW, is_dit, roles_of
from diffsynth.cli.flags import TORCH_NAMES
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import (
    AmbiguousModelError,
    ArgumentError,
    CheckpointError,
    MemoryBudgetError,
    MissingModelError,
)
from diffsynth.models.registry import ARCHITECTURES, NOT_PLANNED
from diffsynth.models.wan.facts import facts_in
from diffsynth.pipelines.usual import usual_values_of
from diffsynth.vram_management.plan import (
    DiTSizes,
    LayerSpec,
    MemoryPlan,
    Rates,
    layers_of_shapes,
    plan_memory,
)

logger = logging.getLogger("diffsynth")

GIB = 2**30
MAX_TOKENS = 1024  # along time, height or width: the length of Wan's own table of positions
FRAMES_OF_A_LATENT = 4
USUAL = -(10**18)  # a size that the model says: no number that anybody gives
STORED = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp8": "F8_E4M3"}
IMAGE_TOKENS = 257  # of a picture, from the Wan2.1 image encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What the command was given."""

    height: int  # pixels, or USUAL
    width: int  # pixels, or USUAL
    num_frames: int  # 4 k + 1, or USUAL
    num_branches: int
    dtype: str  # "bf16", "fp16", "fp32" or "fp8"
    num_persistent: int | None
    vram_gib: float | None
    ram_gib: float | None
    rates: Rates

    def __str__(self) -> str:
        guided = "" if self.num_branches > 1 else ", no guidance"
        return f"{self.height} x {self.width}, {self.num_frames} frames, {self.dtype}{guided}"


@dataclass(kw_only=True)
class Parts:
    """The networks of a pipeline among some files, and what was passed over."""

    matches: dict[str, Match] = field(default_factory=dict)  # by name in the pipeline
    passed_over: list[str] = field(default_factory=list)  # sentences
    _layers: dict[str, list[LayerSpec]] = field(default_factory=dict)  # by dtype

    def layers(self, dtype: str) -> list[LayerSpec]:
        """Every tensor, as it is stored once loaded."""
        if dtype not in self._layers:
            self._layers[dtype] = [
                layer
                for name, match in self.matches.items()
                for layer in layers_of_shapes(
                    name, match.checkpoint.shapes, match.checkpoint.dtypes, stored_dtype=STORED[dtype]
                )
            ]
        return self._layers[dtype]

    def filled(self, request: PlanRequest) -> PlanRequest:
        """The request with the sizes that a call would have, where it names none."""
        dit = self.matches.get("dit")
        facts = facts_in(self.matches.values()) or DiTFacts()
        usual = usual_values_of(
            "t2v" if dit is None else dit.family, has_two_experts="dit_low_noise" in self.matches,
            is_22=facts.holds_first_frame, told={} if dit is None else dit.generation,
        )  # fmt: skip
        height, width, num_frames = (
            int(str(usual[name])) if getattr(request, name) == USUAL else getattr(request, name)
            for name in ("height", "width", "num_frames")
        )
        multiple = facts.spatial_stride * facts.patch[0]
        return replace(
            request,
            height=_snapped("--height", height, multiple),
            width=_snapped("--width", width, multiple),
            num_frames=_snapped("--num-frames", num_frames, FRAMES_OF_A_LATENT, rest=1),
        )

    def plan(self, request: PlanRequest) -> MemoryPlan:
        """Plan a generation.

        Raises:
            MemoryBudgetError: when it does not fit.
        """
        dit = self.matches.get("dit")
        config: Mapping[str, object] = {} if dit is None else dit.require_config()
        image_tokens = config.get("image_tokens_pos") or (IMAGE_TOKENS if config.get("image_dim") else 0)
        assert isinstance(image_tokens, int)
        return plan_memory(
            self.layers(request.dtype), dit=DiTSizes.from_config(config) if dit else None,
            height=request.height, width=request.width, num_frames=request.num_frames,
            num_branches=request.num_branches, image_tokens=image_tokens,
            compute_dtype="BF16" if request.dtype == "fp8" else STORED[request.dtype],
            num_persistent_param_in_dit=request.num_persistent, vram_limit_gib=request.vram_gib,
            ram_limit_gib=request.ram_gib, rates=request.rates,
        )  # fmt: skip


def _snapped(flag: str, value: int, multiple: int, *, rest: int = 0) -> int:
    """The size that a generation of this size has: the next multiple, or the nearest number of frames.

    Raises:
        ArgumentError: for a size that no Wan model makes.
    """
    most = multiple * (MAX_TOKENS - rest) + rest
    if not 1 <= value <= most:
        told = "4 k + 1, such as 81" if rest else f"pixels, a multiple of {multiple}"
        raise ArgumentError(f"{flag} is {value}; give 1 to {most}: {told}.")
    if value % multiple == rest:
        return value
    made = (value + 2) // multiple * multiple + 1 if rest else -(-value // multiple) * multiple
    logger.warning("%s %d is planned as %d, as `diffsynth generate` makes it.", flag, value, made)
    return made


def _check_limits(request: PlanRequest) -> None:
    """NaN and nonsense, in the words of the command; None is no limit."""
    for flag, value in (("--vram", request.vram_gib), ("--ram", request.ram_gib)):
        if value is not None and not 0 < value < math.inf:
            raise ArgumentError(f"{flag} is {value}; give GiB above 0, such as 12.")
    if request.num_persistent is not None and request.num_persistent < 0:
        raise ArgumentError(f"--num-persistent is {request.num_persistent}; give 0 (streams all) or more.")


def find_parts(paths: Sequence[str]) -> Parts:
    """Sort the networks of some files into the parts of a pipeline, by headers alone.

    Raises:
        CheckpointNotFoundError, MissingShardError: as for ``inspect``.
        AmbiguousModelError: when several networks could be one part.
        MissingModelError: when none of them is part of a pipeline, or an adapter comes without a DiT.
    """
    parts, by_file = Parts(), list[list[Match]]()
    for group in group_files(list(paths)):
        try:
            by_file.append(detect(Checkpoint.open_group(group), ARCHITECTURES))
        except CheckpointError as error:
            parts.passed_over.append(str(error))
    low_files = _low_noise_files(by_file)
    for matches in by_file:
        is_low = any(matches is low for low in low_files)
        for match in matches:
            name = match.architecture.part
            if match.architecture.planned_in == NOT_PLANNED:
                parts.passed_over.append(
                    f"{match.checkpoint.source} is {match.needs}. {match.architecture.planned_in}"
                )
            else:
                _put(parts, name + LOW * is_low, match)
    if not parts.matches:
        raise MissingModelError("None of these is a network of a pipeline. " + " ".join(parts.passed_over))
    adapters = [match for match in parts.matches.values() if match.architecture.is_adapter]
    if adapters and "dit" not in parts.matches:
        raise MissingModelError(
            f"{adapters[0].checkpoint.source} is {adapters[0].needs}, which works beside a DiT: "
            "give that too."
        )
    return parts


def _low_noise_files(by_file: Sequence[list[Match]]) -> list[list[Match]]:
    """Of two files with a DiT, the one of the low-noise expert: told by its path, else the second."""
    with_dit = [
        matches
        for matches in by_file
        if is_dit(matches[0]) and matches[0].architecture.planned_in != NOT_PLANNED
    ]
    if len(with_dit) > 2:
        names = ", ".join(matches[0].checkpoint.source for matches in with_dit)
        raise AmbiguousModelError(
            f"{len(with_dit)} DiTs were given: {names}. A pipeline uses one, or two experts; give those."
        )
    if len(with_dit) < 2:
        return []
    roles = roles_of([matches[0] for matches in with_dit])
    if roles is None:
        names = " and ".join(matches[0].checkpoint.source for matches in with_dit)
        raise AmbiguousModelError(
            f"Both {names} are {with_dit[0][0].role}-noise experts; give one of each, or one alone."
        )
    return [with_dit[roles.index("low")]]


def _put(parts: Parts, name: str, match: Match) -> None:
    if name in parts.matches:
        sources = f"{parts.matches[name].checkpoint.source} and {match.checkpoint.source}"
        raise AmbiguousModelError(f"Two files are {match.needs}: {sources}. Give one of them.")
    parts.matches[name] = match


def alternatives(parts: Parts, request: PlanRequest) -> list[str]:
    """What would fit instead: fp8, a smaller picture, fewer frames, one side of the guidance."""
    small = replace(request, height=480, width=832)
    tries = [
        ("--dtype fp8", replace(request, dtype="fp8")),
        ("--height 480 --width 832", small),
        ("--num-frames 49", replace(request, num_frames=49)),
        ("--height 480 --width 832 --num-frames 49", replace(small, num_frames=49)),
        ("--height 480 --width 832 --num-frames 49 --dtype fp8", replace(small, num_frames=49, dtype="fp8")),
    ]
    found = []
    for flags, tried in tries:
        if tried == request or tried.height * tried.width > request.height * request.width:
            continue
        if tried.num_frames > request.num_frames:
            continue
        try:
            parts.plan(tried)
        except MemoryBudgetError:
            continue
        found.append(flags)
    return found


def to_text(plan: MemoryPlan, parts: Parts, request: PlanRequest, paths: Sequence[str]) -> str:
    """Render a plan for people."""
    lines = [f"Plan for {request}", ""]
    rows: list[tuple[str, ...]] = [
        ("phase", "peak GiB", "weights", "slots", "activations", "keys", "libraries")
    ]
    for phase in plan.phases:
        sizes = (
            phase.peak_bytes, phase.weight_bytes, phase.slot_bytes, phase.activation_bytes, phase.key_bytes,
            phase.workspace_bytes,
        )  # fmt: skip
        rows.append((phase.name, *(f"{size / GIB:.2f}" for size in sizes)))
    lines += [*_table(rows), ""]
    rows = [("network", "GiB", "on the device", "each pass GiB", "host")]
    for name, network in plan.networks.items():
        place = {"resident": "stays", "visits": "for its phase, whole"}.get(network.where)
        if place is None:
            count = len(network.resident_blocks)
            place = f"{count} of {network.num_blocks} blocks, {network.num_slots} slots"
        host = {"pinned": network.pinned_bytes, "ring": network.pinned_bytes}.get(network.host, 0)
        rest = f"{host / GIB:.2f} GiB {network.host}" if host else "file"
        if network.pageable_bytes:
            rest += f", {network.pageable_bytes / GIB:.2f} GiB plain"
        size, streamed = f"{network.weight_bytes / GIB:.2f}", f"{network.streamed_bytes / GIB:.2f}"
        rows.append((name, size, place, streamed if network.streamed_bytes else "", rest))
    lines += [*_table(rows), ""]
    reserve = plan.reserve_bytes / GIB
    lines.append(f"Device: {plan.peak_bytes / GIB:.2f} GiB, and {reserve:.2f} GiB for CUDA itself.")
    lines.append(
        f"Host: {plan.pinned_bytes / GIB:.2f} GiB pinned, {plan.pageable_bytes / GIB:.2f} GiB plain; "
        f"{plan.mapped_bytes / GIB:.2f} GiB stay in their files."
    )
    if plan.locked_bytes:
        names = ", ".join(name for name, network in plan.networks.items() if network.locked_bytes)
        lines.append(
            f"Of these, {plan.locked_bytes / GIB:.2f} GiB ({names}) are pinned as well when they come a "
            "second time, where the host has twice as much free; with --ram they never are."
        )
    if plan.compute_s:
        rates, is_ring = request.rates, plan.networks["dit"].host == "ring"
        copy_gbs = rates.ring_gbs if is_ring else rates.copy_gbs
        lines.append(
            f"Each step: {plan.compute_s:.2f} s of compute at {rates.tflops:g} TFLOP/s, {plan.copy_s:.2f} s "
            f"of copies at {copy_gbs:g} GB/s beside it: {plan.verdict}."
        )
    lines += plan.notes
    lines += [f"Passed over: {sentence}" for sentence in parts.passed_over]
    return "\n".join([*lines, "", *_calls(request, paths)]) + "\n"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _calls(request: PlanRequest, paths: Iterable[str]) -> list[str]:
    """The Python that follows this plan."""
    given = {
        "num_persistent_param_in_dit": request.num_persistent,
        "vram_limit": request.vram_gib,
        "ram_limit": request.ram_gib,
    }
    limits = ", ".join(
        f"{name}={value if isinstance(value, int) else f'{value:g}'}"
        for name, value in given.items()
        if value is not None
    )
    load = f'ModelManager(torch_dtype=torch.{TORCH_NAMES[request.dtype]}, device="cpu")'
    lines = [f"manager = {load}.load_models({[str(path) for path in paths]!r})"]
    lines.append('pipe = WanVideoPipeline.from_model_manager(manager, device="cuda")')
    return [*lines, f"pipe.enable_vram_management({limits})"] if limits else lines


def to_json(plan: MemoryPlan, parts: Parts, request: PlanRequest) -> str:
    """Render a plan as one JSON object."""
    phases = [{**asdict(phase), "peak_bytes": phase.peak_bytes} for phase in plan.phases]
    totals = {
        name: getattr(plan, name)
        for name in ("peak_bytes", "pinned_bytes", "pageable_bytes", "mapped_bytes", "locked_bytes")
    }
    told = {**asdict(plan), "phases": phases, **totals, "request": asdict(request)}
    return json.dumps({**told, "passed_over": parts.passed_over}, indent=2)


def run_plan(paths: list[str], request: PlanRequest, as_json: bool) -> None:
    """Write a plan to stdout; when nothing fits, say on stderr what would.

    Raises:
        CheckpointNotFoundError, MissingShardError, AmbiguousModelError, MissingModelError: as `find_parts`.
        ArgumentError: for values that cannot work.
        SystemExit: with status 1 when it does not fit.
    """
    from diffsynth.cli.output import log_to_stderr

    _check_limits(request)
    parts = find_parts(paths)
    try:
        with log_to_stderr(is_quiet=True):
            request = parts.filled(request)
            plan = parts.plan(request)
    except MemoryBudgetError as error:
        fits = alternatives(parts, request)
        if as_json:
            told = {"error": str(error), "minimum_gib": error.minimum_gib, "fits": fits}
            sys.stdout.write(json.dumps(told, indent=2) + "\n")
        flag = "--ram" if error.argument == "ram_limit" else "--vram"
        would = [*fits, f"{flag} {error.minimum_gib:.2f}"]
        sys.stderr.write(f"error: {error}\nThis would fit: {'; or '.join(would)}\n")
        raise SystemExit(1) from None
    sys.stdout.write(
        to_json(plan, parts, request) + "\n" if as_json else to_text(plan, parts, request, paths)
    )

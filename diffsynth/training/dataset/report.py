"""What a dataset turns into: buckets, captions, bytes of its cache, memory and time of a step.

Letters: L tokens of a sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from diffsynth.errors import ArgumentError
from diffsynth.training.dataset.buckets import SmallBucket, bucket_name, small_buckets
from diffsynth.training.dataset.clips import Bucket, DatasetPlan
from diffsynth.training.memory import TrainingChoice, num_lora_parameters, size_of_dit, training_memory
from diffsynth.vram_management.activations import TEMPORAL_STRIDE, Workload
from diffsynth.vram_management.rates import DEFAULT_RATES, DiTSizes, block_flops

GB = 1e9  # bytes, as memory is told of training runs
BF16_BYTES = 2
TEXT_DIM = 4096  # of umT5-XXL
TEXT_TOKENS = 512  # at most, of a caption
TOKENS_PER_WORD = 1.5  # of umT5 on English captions, rounded up; an estimate
LORA_RANK = 32  # of the run that is predicted; the default of `TuneConfig`
PASSES = 3  # forward, again under checkpointing, gradients of activations; frozen weights have none

KNOWN_DITS = {
    "1.3B": DiTSizes(dim=1536, ffn_dim=8960, num_layers=30, num_heads=12, in_dim=16, out_dim=16),
    "14B": DiTSizes(dim=5120, ffn_dim=13824, num_layers=40, num_heads=40, in_dim=16, out_dim=16),
    "5B": DiTSizes(dim=3072, ffn_dim=14336, num_layers=30, num_heads=24, in_dim=48, out_dim=48),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketReport:
    """One bucket, and what a step on one sample of it takes."""

    bucket: Bucket
    num_clips: int  # of an epoch, repeats counted
    tokens: int  # L
    memory_gb: float  # 1e9 bytes, predicted
    step_s: float  # predicted


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionReport:
    """Of the clips' captions, each file counted once."""

    count: int
    empty: int
    distinct: int
    shortest: int  # words
    median: float
    longest: int
    too_long: int  # estimated to have more tokens than the text encoder takes
    most_common: tuple[tuple[str, int], ...]  # captions that several files share


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetReport:
    """Everything that ``diffsynth dataset check`` tells."""

    plan: DatasetPlan
    dit_name: str
    buckets: tuple[BucketReport, ...]
    captions: CaptionReport
    cache_gb: float  # 1e9 bytes, predicted
    epoch_s: float  # predicted
    small: tuple[SmallBucket, ...]
    too_big: tuple[str, ...]  # buckets predicted not to fit, in words


def report_of(
    plan: DatasetPlan,
    *,
    dit: DiTSizes | None = None,
    dit_name: str = "1.3B",
    batch: int = 1,
    accumulation: int = 1,
    vram_gb: float | None = None,
    tflops: float = DEFAULT_RATES.tflops,
) -> DatasetReport:
    """Count a plan and predict what training on it takes.

    Args:
        plan: from ``plan_dataset``.
        dit: sizes of the network; None: those that ``dit_name`` stands for.
        dit_name: one of `KNOWN_DITS`, or any name beside ``dit``.
        batch: samples at a time.
        accumulation: batches of a step.
        vram_gb: memory of the GPU in 1e9 bytes; None leaves open what fits.
        tflops: 1e12 operations per second in bfloat16; the default's source is `Rates`.

    Raises:
        ArgumentError: for an unknown ``dit_name``, or a number that is not above 0.
    """
    sizes = dit or KNOWN_DITS.get(dit_name)
    if sizes is None:
        raise ArgumentError(f"The DiT is {dit_name!r}; known: {', '.join(KNOWN_DITS)}, or a checkpoint.")
    if tflops <= 0 or (vram_gb is not None and vram_gb <= 0):
        raise ArgumentError(f"vram is {vram_gb} and tflops {tflops}; give numbers above 0.")
    small = small_buckets(plan.buckets, batch=batch, accumulation=accumulation)
    rows = tuple(_bucket(bucket, count, sizes, batch, tflops) for bucket, count in plan.buckets.items())
    return DatasetReport(
        plan=plan,
        dit_name=dit_name,
        buckets=rows,
        captions=caption_report(plan),
        cache_gb=cache_bytes(plan, sizes) / GB,
        epoch_s=sum(row.step_s * row.num_clips / batch for row in rows),
        small=small,
        too_big=()
        if vram_gb is None
        else tuple(_too_big(row, vram_gb) for row in rows if row.memory_gb > vram_gb),
    )


def _bucket(bucket: Bucket, count: int, dit: DiTSizes, batch: int, tflops: float) -> BucketReport:
    work = Workload(
        num_frames=bucket[0], height=bucket[1], width=bucket[2], batch=batch, num_branches=1,
        text_tokens=TEXT_TOKENS,
    )  # fmt: skip
    tokens = work.tokens(dit)
    lora = TrainingChoice(num_trained=num_lora_parameters(dit, LORA_RANK))
    flops = block_flops(dit, tokens=tokens, context_tokens=TEXT_TOKENS, keeps_keys=False) * dit.num_layers
    return BucketReport(
        bucket=bucket,
        num_clips=count,
        tokens=tokens,
        memory_gb=training_memory(dit, size_of_dit(dit), work, lora).device / GB,
        step_s=batch * PASSES * flops / (tflops * 1e12),
    )


def _too_big(row: BucketReport, vram_gb: float) -> str:
    return (
        f"bucket {bucket_name(row.bucket)} is predicted to need {row.memory_gb:.1f} GB and there are "
        f"{vram_gb:g} GB: it will not fit with resident bf16 weights. Smaller sizes or fewer frames, a "
        "smaller batch, fp8 or streamed base weights, or checkpoints offloaded to the host."
    )


def cache_bytes(plan: DatasetPlan, dit: DiTSizes) -> int:
    """Bytes of the cached samples: latents in bfloat16, and text trimmed to its tokens.

    Planes and image tokens of conditions come on top; they depend on the model.
    """
    total = 0
    for clip in plan.clips:
        num_frames, height, width = clip.bucket
        frames = (num_frames - 1) // TEMPORAL_STRIDE + 1
        positions = frames * (height // dit.spatial_stride) * (width // dit.spatial_stride)
        total += BF16_BYTES * (dit.out_dim * positions + TEXT_DIM * _tokens(clip.item.caption))
    return total


def _tokens(caption: str) -> int:
    return min(TEXT_TOKENS, math.ceil(TOKENS_PER_WORD * len(caption.split())) + 1)


def caption_report(plan: DatasetPlan, *, num_common: int = 3) -> CaptionReport:
    """Statistics of captions; a file with several clips counts once."""
    captions = [item.caption for item in {clip.item.media: clip.item for clip in plan.clips}.values()]
    words = sorted(len(caption.split()) for caption in captions)
    counts = Counter(caption for caption in captions if caption)
    return CaptionReport(
        count=len(captions),
        empty=sum(not caption for caption in captions),
        distinct=len(counts),
        shortest=words[0] if words else 0,
        median=median(words) if words else 0.0,
        longest=words[-1] if words else 0,
        too_long=sum(math.ceil(TOKENS_PER_WORD * count) >= TEXT_TOKENS for count in words),
        most_common=tuple(pair for pair in counts.most_common(num_common) if pair[1] > 1),
    )


def to_text(report: DatasetReport, *, num_shown: int = 10) -> str:
    """Render a report for people; lists are cut after ``num_shown`` lines."""
    plan, captions = report.plan, report.captions
    usable = len({clip.item.media for clip in plan.clips})
    pictures = sum(len(clip.indices) == 1 for clip in plan.clips)
    lines = [
        f"{plan.num_items} files listed, {usable} used, {len(plan.dropped)} dropped; {len(plan.clips)} clips"
        f" ({pictures} of one frame), {sum(plan.buckets.values())} per epoch",
        "",
        f"{'bucket':<28}{'clips':>8}{'tokens':>9}{'GB':>8}{'s/step':>9}   predicted for {report.dit_name}",
    ]
    lines += [
        f"{bucket_name(row.bucket):<28}{row.num_clips:>8}{row.tokens:>9}{row.memory_gb:>8.1f}{row.step_s:>9.2f}"
        for row in report.buckets
    ]
    lines += [
        "",
        f"cache: about {report.cache_gb:.3g} GB; an epoch: about {report.epoch_s / 3600:.2g} h "
        f"(LoRA of rank {LORA_RANK}, gradient checkpointing, bf16 weights resident; counted, not measured)",
        f"captions: {captions.distinct} distinct of {captions.count}, {captions.empty} empty, "
        f"{captions.shortest} to {captions.longest} words (median {captions.median:g})",
    ]
    if captions.too_long:
        lines.append(
            f"  {captions.too_long} may have more than {TEXT_TOKENS} tokens; the rest of them is not read"
        )
    lines += [f"  {count} files share {caption[:80]!r}" for caption, count in captions.most_common]
    lines += [f"warning: {text}" for text in (*map(str, report.small), *report.too_big)]
    dropped = [f"{entry.media.name}: {entry.reason}" for entry in plan.dropped]
    lines += _cut("dropped", dropped, num_shown, ", ".join(map(str, plan.lists)))
    lines += _cut("not used, or changed", [str(note) for note in plan.notes], num_shown, "--json")
    return "\n".join(lines)


def _cut(title: str, entries: Sequence[str], count: int, where: str) -> list[str]:
    if not entries:
        return []
    more = [f"  ... {len(entries) - count} more: {where}"] if len(entries) > count else []
    listed = [f"  {entry}" for entry in entries[:count]]
    return ["", f"{title} ({len(entries)}):", *listed, *more]


def to_object(report: DatasetReport) -> dict[str, object]:
    """The report as plain values for JSON."""
    plan, captions = report.plan, report.captions
    return {
        "files": plan.num_items,
        "clips": len(plan.clips),
        "clips_per_epoch": sum(plan.buckets.values()),
        "dit": report.dit_name,
        "buckets": [
            {
                "num_frames": row.bucket[0], "height": row.bucket[1], "width": row.bucket[2],
                "clips": row.num_clips, "tokens": row.tokens, "memory_gb": round(row.memory_gb, 3),
                "step_s": round(row.step_s, 4),
            }
            for row in report.buckets
        ],
        "small_buckets": [str(small) for small in report.small],
        "too_big": list(report.too_big),
        "cache_gb": report.cache_gb,
        "epoch_s": report.epoch_s,
        "captions": {
            "count": captions.count, "distinct": captions.distinct, "empty": captions.empty,
            "words": [captions.shortest, captions.median, captions.longest], "too_long": captions.too_long,
        },
        "dropped": [{"file": str(entry.media), "reason": entry.reason} for entry in plan.dropped],
        "notes": [{"file": note.media and str(note.media), "text": note.text} for note in plan.notes],
        "lists": [str(path) for path in plan.lists],
    }  # fmt: skip

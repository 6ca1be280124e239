"""Buckets that will not fit into the GPU, told before the first step: arithmetic alone."""

from __future__ import annotations

from dataclasses import asdict

from diffsynth.training.config import TrainConfig
from diffsynth.training.dataset.buckets import bucket_name
from diffsynth.training.dataset.clips import Bucket, DatasetPlan
from diffsynth.training.learners import Learner
from diffsynth.training.loading import Loaded
from diffsynth.training.memory import TrainingChoice, training_memory
from diffsynth.training.recompute import NUM_SLOTS
from diffsynth.training.tuning import WITH_FACTORS
from diffsynth.vram_management.activations import Workload
from diffsynth.vram_management.layers import SPELLINGS, layers_of_module, sizes_of
from diffsynth.vram_management.rates import DiTSizes

GB = 1e9
NARROW, WIDE = 2, 4  # bytes of a weight that trains: under stochastic rounding, as a float32 master


def too_large(config: TrainConfig, plan: DatasetPlan, loaded: Loaded, gpu_gb: float) -> list[str]:
    """A line for each bucket whose step is predicted to take more than the GPU has.

    Args:
        config: of the run.
        plan: of its data.
        loaded: networks, with what trains of them.
        gpu_gb: memory of one GPU, 1e9 bytes.
    """
    batches: dict[Bucket, int] = {}  # the most samples at a time
    for clip in plan.clips:
        frames, height, width = clip.bucket
        shown = (1 if clip.moments else frames, height, width)
        batches[shown] = max(batches.get(shown, 0), clip.batch_size or config.run.batch_size)
    lines = []
    for bucket, batch in sorted(batches.items()):
        need = max(_bytes(config, learner, bucket, batch) for learner in loaded.learners) / GB
        if need > gpu_gb:
            lines.append(
                f"bucket {bucket_name(bucket)} with {batch} samples at a time is predicted to take "
                f"{need:.1f} GB, and the GPU has {gpu_gb:.1f} GB. What helps, in this order: "
                "memory.gradient_checkpointing full, memory.offload, memory.stream or model.dtype fp8, "
                "a smaller size or fewer frames."
            )
    return lines


def _bytes(config: TrainConfig, learner: Learner, bucket: Bucket, batch: int) -> int:
    frames, height, width = bucket
    dit, memory = learner.denoiser.dit, config.memory
    choice = TrainingChoice(
        num_trained=learner.tuned.num_parameters, trains_whole=config.tune.kind not in WITH_FACTORS,
        trained_bytes=NARROW if learner.tuned.rounding else WIDE,
        checkpointing=memory.gradient_checkpointing, is_offloaded=memory.offload,
        num_slots=NUM_SLOTS if memory.stream else 0,
    )  # fmt: skip
    work = Workload(
        height=height, width=width, num_frames=frames, batch=batch, num_branches=1,
        compute_dtype=SPELLINGS.get(config.model.dtype, "BF16"),  # fp8 is kept, and computed in bfloat16
    )  # fmt: skip
    size = sizes_of(layers_of_module("dit", dit))["dit"]
    return training_memory(DiTSizes.from_config(asdict(dit.config)), size, work, choice).device

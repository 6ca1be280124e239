"""Buckets that will not fit into the GPU, told before the first step: arithmetic alone."""

from __future__ import annotations

from dataclasses import asdict

from diffsynth.training.config import TrainConfig
from diffsynth.training.dataset.buckets import bucket_name
from diffsynth.training.dataset.clips import Bucket, DatasetPlan
from diffsynth.training.loading import Loaded
from diffsynth.training.memory import TrainingChoice, training_memory
from diffsynth.training.tuning import WITH_FACTORS
from diffsynth.vram_management.activations import Workload
from diffsynth.vram_management.layers import layers_of_module, sizes_of
from diffsynth.vram_management.rates import DiTSizes

GB = 1e9
SLOTS = 2  # of `StreamedBase`
NARROW, WIDE = 2, 4  # bytes of a weight that trains: under stochastic rounding, as a float32 master
COMPUTE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "fp8": "BF16"}


def too_large(config: TrainConfig, plan: DatasetPlan, loaded: Loaded, gpu_gb: float) -> list[str]:
    """A line for each bucket whose step is predicted to take more than the GPU has.

    Args:
        config: of the run.
        plan: of its data.
        loaded: networks, with what trains of them.
        gpu_gb: memory of one GPU, 1e9 bytes.
    """
    lines = []
    for bucket in plan.buckets:
        batch = max(clip.batch_size or config.run.batch_size for clip in plan.clips if clip.bucket == bucket)
        need = (
            max(_bytes(config, loaded, number, bucket, batch) for number in range(len(loaded.learners))) / GB
        )
        if need > gpu_gb:
            lines.append(
                f"bucket {bucket_name(bucket)} with {batch} samples at a time is predicted to take "
                f"{need:.1f} GB, and the GPU has {gpu_gb:.1f} GB: it will run out of memory. In this order: "
                "memory.gradient_checkpointing full, memory.offload, memory.stream or model.dtype fp8, "
                "a smaller size or fewer frames."
            )
    return lines


def _bytes(config: TrainConfig, loaded: Loaded, number: int, bucket: Bucket, batch: int) -> int:
    frames, height, width = bucket
    learner, memory = loaded.learners[number], config.memory
    dit = learner.denoiser.dit
    choice = TrainingChoice(
        num_trained=learner.tuned.num_parameters, trains_whole=config.tune.kind not in WITH_FACTORS,
        trained_bytes=NARROW if learner.tuned.rounding else WIDE,
        checkpointing=memory.gradient_checkpointing, is_offloaded=memory.offload,
        num_slots=SLOTS if memory.stream else 0,
    )  # fmt: skip
    work = Workload(
        height=height, width=width, num_frames=frames, batch=batch, num_branches=1,
        compute_dtype=COMPUTE_DTYPES[config.model.dtype],
    )  # fmt: skip
    size = sizes_of(layers_of_module("dit", dit))["dit"]
    return training_memory(DiTSizes.from_config(asdict(dit.config)), size, work, choice).device

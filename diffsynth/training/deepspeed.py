"""The settings of DeepSpeed, for those who use it; FSDP2 does the same without another package."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import Strategy

from diffsynth.errors import MissingPackageError


def deepspeed_config(stage: int) -> dict[str, object]:
    """What DeepSpeed is told. Clipping, accumulation and the learning rate are the trainer's own."""
    zero: dict[str, object] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
    }


def deepspeed_strategy(name: str, timeout: timedelta) -> Strategy:
    """Lightning's strategy for "deepspeed_stage_1", "_2" or "_3".

    Raises:
        MissingPackageError: when DeepSpeed is not installed.
    """
    from lightning.pytorch.strategies import DeepSpeedStrategy

    try:
        return DeepSpeedStrategy(config=deepspeed_config(int(name[-1])), timeout=timeout)
    except ImportError as error:
        raise MissingPackageError("deepspeed", f"run.strategy {name}", "pip install deepspeed") from error

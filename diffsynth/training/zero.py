"""DeepSpeed's ZeRO: the optimizer's state, and from stage 2 the gradients, in parts over the GPUs.

Weights stay whole on each. DeepSpeed lays what trains end to end, gives each rank a piece of that vector,
and clips and steps by itself. A checkpoint has the state whole and by parameter, as every other strategy
writes it, so that a run may go on under another one. Stage 3 shards the weights too, as FSDP2 does, which
serves for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from diffsynth.errors import ArgumentError, MissingPackageError, install_extra
from diffsynth.training.config import ZERO_STAGES, TrainConfig

BUCKET_SIZE = 200_000_000  # numbers that travel at once; DeepSpeed's usual 5e8 takes 2 GB beside the model


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own settings for a run.

    Source: deepspeed.ai/docs/config-json. ``gradient_accumulation_steps`` is left to Lightning, which sets 1:
    the training module says itself which pass ends a step.
    """
    return {
        "train_micro_batch_size_per_gpu": config.run.batch_size,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": ZERO_STAGES[config.run.strategy],
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_SIZE,
            "allgather_bucket_size": BUCKET_SIZE,
        },
        "steps_per_print": sys.maxsize,  # the run has a log of its own
    }


def deepspeed_strategy(config: TrainConfig) -> DeepSpeedStrategy:
    """Lightning's strategy for `deepspeed_config`.

    Raises:
        MissingPackageError: when DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        strategy = f"run.strategy {config.run.strategy}"
        raise MissingPackageError("deepspeed", strategy, install_extra("deepspeed"))
    return DeepSpeedStrategy(
        config=deepspeed_config(config), timeout=timedelta(seconds=config.run.timeout_s),
        precision_plugin=_AsItComes("32-true"),
    )  # fmt: skip


class _AsItComes(DeepSpeedPrecision):
    """Leaves batches alone: the DiT takes what it needs, in the dtype that it needs."""

    def convert_input(self, data: Any) -> Any:
        return data


def require_gpu(config: TrainConfig, device: torch.device) -> None:
    """Say before anything loads that DeepSpeed will not run here.

    Raises:
        ArgumentError: without a GPU.
    """
    if config.run.strategy in ZERO_STAGES and device.type != "cuda":
        raise ArgumentError(
            f"run.strategy is {config.run.strategy} and the device {device.type}; Lightning runs DeepSpeed "
            "on CUDA GPUs alone. Use ddp or fsdp2."
        )


class Zero:
    """What the training module asks of DeepSpeed's engine.

    Args:
        engine: a ``deepspeed.DeepSpeedEngine`` with an optimizer of stage 1 or 2.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._sharded = engine, engine.optimizer

    def expect(self, *, is_last: bool) -> None:
        """Whether the coming backward pass is the last of its step."""
        self._engine.set_gradient_accumulation_boundary(is_last)

    @property
    def grad_norm(self) -> float:
        """Of the last step, before clipping, over all ranks; infinite where the step was skipped for it."""
        return float(self._engine.get_global_grad_norm())

    def state(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """The optimizer's state as torch writes it, whole; every rank must ask for it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        numbers = _numbers(parameters)
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, members, piece in self._groups():
            own = self._sharded.optimizer.state[piece]
            for parameter in members:
                state[numbers[id(parameter)]] = {
                    key: safe_get_full_optimizer_state(parameter, key) if _is_like(value, piece) else value
                    for key, value in own.items()
                }
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({**settings, "params": sorted(numbers[id(parameter)] for parameter in members)})
        return {"state": dict(sorted(state.items())), "param_groups": groups, "names": list(parameters)}

    def load(
        self, saved: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], options: Mapping[str, object]
    ) -> None:
        """Take over a state that `state`, or any other strategy, gave; ``options`` are this run's."""
        from deepspeed.utils import safe_set_full_optimizer_state

        numbers, state = _numbers(parameters), saved["state"]
        for group, members, piece in self._groups():
            first = state.get(numbers[id(members[0])], {})
            self._sharded.optimizer.state[piece] = {
                key: torch.zeros_like(piece) if _is_like(value, members[0]) else value
                for key, value in first.items()
            }
            kept = {"params", *options}
            group |= {key: value for key, value in saved["param_groups"][0].items() if key not in kept}
        self._sharded._lazy_init_hp_params_optimizer_state()
        for _, members, _ in self._groups():
            for parameter in members:
                for key, value in state.get(numbers[id(parameter)], {}).items():
                    if _is_like(value, parameter):
                        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _groups(self) -> list[tuple[dict[str, Any], list[nn.Parameter], nn.Parameter]]:
        """Of each group its settings, its parameters, and this rank's piece of them."""
        sharded = self._sharded
        return list(
            zip(
                sharded.param_groups,
                sharded.bit16_groups,
                sharded.single_partition_of_fp32_groups,
                strict=True,
            )
        )


def _numbers(parameters: Mapping[str, nn.Parameter]) -> dict[int, int]:
    return {id(parameter): number for number, parameter in enumerate(parameters.values())}


def _is_like(value: object, model: torch.Tensor) -> bool:
    """Whether it is a state of each number, not of all of them together such as a count of steps."""
    return isinstance(value, torch.Tensor) and value.shape == model.shape

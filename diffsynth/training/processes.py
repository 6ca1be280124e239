"""The processes of a run: how many there are, how they work together, and what is said when one is lost."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from diffsynth.errors import ArgumentError, DiffSynthError
from diffsynth.training.config import ZERO_STAGES, RunConfig, TrainConfig
from diffsynth.training.zero import deepspeed_strategy

# What the libraries say when another process is gone or silent.
SIGNS_OF_A_LOST_RANK = ("closed by peer", "Connection reset", "imed out", "timeout", "NCCL", "gloo")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How many processes train, and which this is."""

    devices: int  # on each machine
    nodes: int
    rank: int
    is_external: bool  # torchrun started them; otherwise Lightning does

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> Ranks:
        """By the environment, else by the config."""
        env = os.environ
        if "TORCHELASTIC_RUN_ID" in env:
            local = int(env["LOCAL_WORLD_SIZE"])
            return cls(
                devices=local, nodes=int(env["WORLD_SIZE"]) // local, rank=int(env["RANK"]), is_external=True
            )
        if config.run.nodes > 1:
            raise ArgumentError(
                f"run.nodes is {config.run.nodes}: start the run on each machine with torchrun --nnodes "
                f"{config.run.nodes} --nproc-per-node GPUS -m diffsynth train ..., which tells them apart."
            )
        found = torch.cuda.device_count() if device.type == "cuda" else 1
        return cls(
            devices=config.run.devices or found, nodes=config.run.nodes, rank=int(env.get("LOCAL_RANK", 0)),
            is_external=False,
        )  # fmt: skip


class Group:
    """The one default group of a run that torchrun started, for encoding and for training alike.

    A second one on the same store would find the addresses that the first has left there. With one process,
    or where Lightning starts the others, there is nothing to do.

    Args:
        ranks: the processes.
        device: where they compute.
        run: how long they wait for each other in training.
        encodes: whether they first encode, for which they may wait much longer.
    """

    def __init__(self, ranks: Ranks, device: torch.device, run: RunConfig, *, encodes: bool) -> None:
        self._waiting: dist.ProcessGroup | None = None
        if not (ranks.is_external and ranks.world > 1):
            return
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=run.timeout_s))
            if backend == "nccl":
                atexit.register(_end_group)
        if encodes:  # made while all are here: nobody waits for its connections
            group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            self._waiting = cast("dist.ProcessGroup", group)

    def wait_for_all(self) -> None:
        """Go on when every process has come here."""
        if self._waiting is not None:
            dist.barrier(group=self._waiting)


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def strategy_of(config: TrainConfig, world: int, num_experts: int) -> str | Strategy:
    """Lightning's strategy for the one that is named.

    Args:
        config: names it.
        world: number of processes.
        num_experts: of two, one rests in each step, and DDP must look for what has no gradient.
    """
    run = config.run
    if run.strategy in ZERO_STAGES:
        return deepspeed_strategy(config)
    timeout = timedelta(seconds=run.timeout_s)
    if run.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timeout,
        )
    if world == 1 and run.strategy == "auto":
        return "auto"
    # A bucket whose clips have no input for an adapter does not visit it: its tensors get no gradient.
    may_rest = num_experts > 1 or config.tune.kind == "parts" or config.tune.networks != ("dit",)
    return DDPStrategy(timeout=timeout, find_unused_parameters=may_rest)


def is_of_a_lost_rank(error: Exception) -> bool:
    """Whether it says that another process is gone or silent."""
    return any(sign in str(error) for sign in SIGNS_OF_A_LOST_RANK)


def lost_rank(run: RunConfig, error: Exception, kept: Path | None) -> DiffSynthError:
    """The same, for a user.

    Args:
        run: says how long was waited.
        error: of the library.
        kept: the last checkpoint.
    """
    last = f"The last checkpoint is {kept}." if kept else "No checkpoint was written yet."
    return DiffSynthError(
        f"A process of the run ended or did not answer within {run.timeout_s:g} s (run.timeout_s): "
        f"{str(error).splitlines()[0][:300]}. Its own output says why. {last} Go on with run.resume: latest."
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """What it says about accelerators and its other products is of no use here; warnings are."""
    others = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    ]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Of its own use of torch, which nobody here can change.
            warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")
            yield
    finally:
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)

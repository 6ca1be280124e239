"""Optimizers by dotted name, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffsynth.errors import ArgumentError, MissingPackageError, UnknownArgumentError
from diffsynth.training.config import OptimizerConfig

SHORT_NAMES = {
    "adamw": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "prodigy": "prodigyopt.Prodigy",
    "schedule_free": "schedulefree.AdamWScheduleFree",
}

SHARE = "share_of_learning_rate"  # of a group of parameters; not there: all of it


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer that a config names.

    Raises:
        MissingPackageError: when its package is not installed.
        ArgumentError: for a name that is no optimizer, or values that it refuses.
        UnknownArgumentError: for an option that it does not take, with the nearest.
    """
    kind = _optimizer_class(config.name)
    options: dict[str, Any] = {"lr": config.learning_rate}
    options |= {k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()}
    known = inspect.signature(kind).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for name in options:
            if name not in known:
                raise UnknownArgumentError(name, set(known) - {"params"}, config.name)
    try:
        optimizer = kind(list(parameters), **options)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{config.name} refuses {options}: {error}.") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    for group in optimizer.param_groups:
        if group["lr"] != config.learning_rate:  # an optimizer that gives some parameters a rate of their own
            group[SHARE] = group["lr"] / config.learning_rate
    return optimizer


def learning_rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the learning rate at a step (0 is the first): warm-up, then the schedule to its end."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    total = max(1, num_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / total)
    floor = config.final_share
    if config.schedule == "linear":
        return 1 - (1 - floor) * done
    if config.schedule == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "cosine_restarts":
        turn = (done * config.restarts) % 1.0 if done < 1.0 else 1.0
        return floor + (1 - floor) * (1 + math.cos(math.pi * turn)) / 2
    if config.schedule == "decay":  # constant, then linear over the last fifth
        return 1.0 if done < 0.8 else 1 - (1 - floor) * (done - 0.8) / 0.2
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group of parameters this learning rate, or its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(SHARE, 1.0)


@contextmanager
def evaluated(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Schedule-free optimizers train at one point and are judged at another: stand at the latter inside."""
    with_modes = [one for one in optimizers if hasattr(one, "eval") and hasattr(one, "train")]
    # The way there and back rounds: who looks must not change what comes after.
    kept = [(p, p.detach().clone()) for one in with_modes for g in one.param_groups for p in g["params"]]
    for optimizer in with_modes:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in with_modes:
            optimizer.train()
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def named_state(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Any]:
    """The optimizer's state, with the names of its parameters beside it."""
    return {**optimizer.state_dict(), "names": names}


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = SHORT_NAMES.get(name, name).rpartition(".")
    if not module_name:
        raise ArgumentError(
            f"optimizer.name is {name!r}; give {', '.join(SHORT_NAMES)}, or a dotted name such as "
            "torch.optim.Adafactor."
        )
    package = module_name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(package, f"the optimizer {name!r}", f"pip install {package}") from error
    kind = getattr(module, class_name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        known: Mapping[str, object] = vars(module)
        raise UnknownArgumentError(class_name, [n for n in known if n[0].isupper()], module_name)
    return kind

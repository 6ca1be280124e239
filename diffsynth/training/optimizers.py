"""Optimizers by dotted name, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffsynth.errors import ArgumentError, MissingPackageError, UnknownArgumentError
from diffsynth.training.config import OptimizerConfig

logger = logging.getLogger("diffsynth")

SHORT_NAMES = {
    "adamw": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "prodigy": "prodigyopt.Prodigy",
    "schedule_free": "schedulefree.AdamWScheduleFree",
}

RATE_SETTINGS = ("learning_rate", "schedule", "warmup_steps", "restarts", "final_share")
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
    except Exception as error:  # values of the user's, in code that is not ours
        raise ArgumentError(f"{config.name} refuses {options}: {error}.") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    for group in optimizer.param_groups:
        if group["lr"] != config.learning_rate:  # an optimizer that gives some parameters a rate of their own
            group[SHARE] = group["lr"] / config.learning_rate
    return optimizer


def try_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """Make the optimizer of a small weight and take one step: what cannot work is told before a run begins.

    Raises:
        As `make_optimizer`.
        ArgumentError: when the step fails.
    """
    weight = nn.Parameter(torch.ones(4, 4, device=device))
    optimizer = make_optimizer([weight], config)
    weight.grad = torch.ones_like(weight)
    try:
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()
    except Exception as error:  # of a package that is not ours
        raise ArgumentError(
            f"optimizer.name is {config.name!r}, and its first step fails on {device.type} with options "
            f"{dict(config.options)}: {type(error).__name__}: {error}. Give other options, or another one of "
            f"{', '.join(SHORT_NAMES)}."
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """Where the learning rate begins to follow its schedule: its warm-up, or where a run was extended."""

    start: int = 0  # step; the warm-up comes before it
    share: float = 1.0  # of the learning rate, from which it goes on
    stop: int  # run.steps, as they were then


def learning_rate_factor(
    step: int, num_steps: int, config: OptimizerConfig, course: Course | None = None
) -> float:
    """Share of the learning rate at a step (0 is the first): warm-up, then the schedule to its end."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start, top = (config.warmup_steps, 1.0)
    if course is not None and course.start > config.warmup_steps:
        start, top = course.start, course.share
    done = min(1.0, (step - start) / max(1, num_steps - start))
    floor = min(config.final_share, top)
    if config.schedule == "linear":
        return top - (top - floor) * done
    if config.schedule == "cosine":
        return floor + (top - floor) * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "cosine_restarts":
        turn = (done * config.restarts) % 1.0 if done < 1.0 else 1.0
        return floor + (top - floor) * (1 + math.cos(math.pi * turn)) / 2
    if config.schedule == "decay":  # constant, then linear over the last fifth
        return top if done < 0.8 else top - (top - floor) * (done - 0.8) / 0.2
    return 1.0


def resumed_course(
    before: Course, step: int, now: OptimizerConfig, then: OptimizerConfig, steps: int
) -> Course:
    """The course of a run that goes on: where its end alone has moved, from the rate that it had.

    Args:
        before: of the run that it goes on with.
        step: done.
        now: the settings; only those of the learning rate are looked at.
        then: those of the run that it goes on with.
        steps: ``run.steps`` now.
    """
    was = learning_rate_factor(step - 1, before.stop, then, before)
    if now != then:  # as the user says
        course = Course(stop=steps)
    elif before.stop == steps or step <= now.warmup_steps or now.schedule == "constant":
        return replace(before, stop=steps)
    else:
        course = Course(start=step, share=was, stop=steps)
    rates = (
        then.learning_rate * was,
        *(now.learning_rate * learning_rate_factor(at, steps, now, course) for at in (step, steps)),
    )
    logger.warning(
        "%s: the learning rate was %.3g at step %d, is %.3g at step %d and %.3g at the end (%s). Where the "
        "end alone moves, it goes on from there; for another change optimizer.schedule or learning_rate.",
        "The schedule is another" if now != then else f"run.steps was {before.stop} and is {steps} now",
        rates[0], step, rates[1], step + 1, round(rates[2], 14), now.schedule,
    )  # fmt: skip
    return course


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
    except Exception as error:  # a package that is there and does not work
        raise ArgumentError(
            f"optimizer.name is {name!r}, and {module_name} cannot be imported: {error}. Mend the package, "
            f"or give another one of {', '.join(SHORT_NAMES)}."
        ) from error
    kind = getattr(module, class_name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        known: Mapping[str, object] = vars(module)
        raise UnknownArgumentError(class_name, [n for n in known if n[0].isupper()], module_name)
    return kind

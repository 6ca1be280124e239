from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffsynth.training.config import OptimizerConfig
from diffsynth.training.optimizers import (
    Course,
    evaluated,
    learning_rate_factor,
    make_optimizer,
    resumed_course,
    set_learning_rate,
)


class TwoRates(torch.optim.SGD):
    """Vectors at a rate of their own."""

    def __init__(self, params: list[nn.Parameter], lr: float, vector_lr: float) -> None:
        vectors = [p for p in params if p.ndim == 1]
        matrices = [p for p in params if p.ndim > 1]
        super().__init__([{"params": matrices}, {"params": vectors, "lr": vector_lr}], lr=lr)


def test_a_rate_of_its_own_follows_the_schedule_in_proportion_and_survives_a_resume() -> None:
    parameters = list(nn.Linear(2, 2).parameters())
    config = OptimizerConfig(name=f"{__name__}.TwoRates", learning_rate=0.4, options={"vector_lr": 0.1})
    optimizer = make_optimizer(parameters, config)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.05])
    resumed = make_optimizer(parameters, config)
    resumed.load_state_dict(optimizer.state_dict())
    set_learning_rate(resumed, 0.4)
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx([0.4, 0.1])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_restarts", "decay"])
@pytest.mark.parametrize(("done", "steps"), [(40, 60), (20, 60), (20, 30), (5, 400)])
def test_a_run_with_another_end_goes_on_from_its_rate(schedule: Any, done: int, steps: int) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10, restarts=2)
    before = Course(stop=40)
    course = resumed_course(before, done, config, config, steps)
    last = learning_rate_factor(done - 1, 40, config, before)
    rest = [learning_rate_factor(step, steps, config, course) for step in range(done, steps)]
    if done > config.warmup_steps:
        assert rest[0] == pytest.approx(last) and max(rest) <= last + 1e-12
    else:
        assert max(rest) == 1.0 and rest[0] == pytest.approx(last + 0.1)
    assert rest[-1] < 0.6 * last
    again = resumed_course(course, done, config, config, steps)
    assert again == course


def test_who_looks_at_a_schedule_free_optimizer_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.randn(64))
    before, point = weight.detach().clone(), torch.randn(64)

    class Two(torch.optim.SGD):
        def eval(self) -> None:
            with torch.no_grad():
                weight.lerp_(point, 0.9)

        def train(self) -> None:
            with torch.no_grad():
                weight.lerp_(point, 1 - 1 / 0.1)

    with evaluated([Two([weight], lr=0.1)]):
        assert not torch.allclose(weight, before)
    assert torch.equal(weight, before)

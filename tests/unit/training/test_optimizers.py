from __future__ import annotations

import pytest
import torch
from torch import nn

from diffsynth.training.config import OptimizerConfig
from diffsynth.training.optimizers import evaluated, make_optimizer, set_learning_rate


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

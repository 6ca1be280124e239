"""Muon: momentum whose matrices are made orthogonal. The tiny VAE learns faster with it than with Adam.

A convolution's weight counts as one matrix, (out, in x kernel). Vectors and scalars are left to Adam, in the
same optimizer. Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # pushes all singular values towards 1 in five rounds


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearest matrices with equal singular values, about; (n, rows, columns), each on its own."""
    x = matrices / (matrices.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and p.shape[0] > 1 and p.numel() > p.shape[0]


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dims, Adam for the rest.

    Args:
        parameters: all of a network's.
        lr: step of a matrix, in units of its rms per entry times 0.2.
        adam_lr: step of the rest.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, adam_lr: float, weight_decay: float = 0.0
    ) -> None:
        everything = list(parameters)
        groups = [
            {"params": [p for p in everything if _is_matrix(p)], "muon": True, "lr": lr},
            {"params": [p for p in everything if not _is_matrix(p)], "muon": False, "lr": adam_lr},
        ]
        super().__init__(groups, {"weight_decay": weight_decay})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            updates = self._muon(active) if group["muon"] else [self._adam(p) for p in active]
            for p, update in zip(active, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _muon(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        matrices = []
        for index, p in enumerate(parameters):
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            matrices.append(p.grad.lerp(momentum, 0.95).flatten(1))
            by_shape.setdefault(tuple(matrices[-1].shape), []).append(index)
        updates: list[Tensor] = list(matrices)
        for shape, indices in by_shape.items():
            # Equal shapes together: one batched product keeps all cores busy.
            made = orthogonal(torch.stack([matrices[i] for i in indices])) * (0.2 * max(shape) ** 0.5)
            for i, update in zip(indices, made, strict=True):
                updates[i] = update.view_as(parameters[i])
        return updates

    def _adam(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state.update(first=torch.zeros_like(p), second=torch.zeros_like(p), count=torch.zeros(()))
        state["count"] += 1
        state["first"].lerp_(p.grad, 0.1)
        state["second"].lerp_(p.grad.square(), 0.01)
        first = state["first"] / (1 - 0.9 ** state["count"])
        return first / ((state["second"] / (1 - 0.99 ** state["count"])).sqrt() + 1e-8)

"""A difference as the product of two narrow matrices."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_SIZE = 1024  # matrices up to this size are decomposed exactly
OVERSAMPLING = 16  # directions more than asked for; they are dropped at the end
ITERATIONS = 4


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return down (r, K) and up (N, r), whose product is the nearest to ``matrix`` (N, K) of a rank.

    Large matrices are projected on a random subspace that is iterated towards their largest directions
    (Halko, Martinsson, Tropp 2011, algorithm 4.4); the draw has a fixed seed. r is at most min(N, K).
    """
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_SIZE or 4 * (rank + OVERSAMPLING) >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator).to(matrix.device)
        basis = torch.linalg.qr(matrix @ probe).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ inner
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root

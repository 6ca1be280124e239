"""Text for cross-attention, with its padding told once instead of hundreds of times.

Letters: B batch, T text tokens, P padding rows, D width.
Wan's text is padded with zero rows to ``text_len``, and these rows are attended to: the models were trained
so. All padding rows are equal, so their keys and values are equal in every block, and P equal keys weigh as
much as one key whose score is raised by ln P. Keys, values and their products shrink from 512 rows to the
prompt's own length; the result is the same sum in another order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_MULTIPLE = 8  # key counts that memory-efficient kernels with a bias want
MIN_STANDINS = 4  # this many roundings to bfloat16 leave a relative error below 1e-7


@dataclass(frozen=True, kw_only=True)
class TextTokens:
    """Rows of text after or before the text embedding."""

    x: Tensor  # (B, T + stand-ins, D)
    bias: Tensor | None  # (1, 1, 1, T + stand-ins): raises the stand-ins' scores; None when nothing is padded


def compact_padding(text: Tensor, text_len: int) -> TextTokens:
    """Replace zero rows at the end, and those that padding to ``text_len`` would add, by a few stand-ins.

    Args:
        text: (B, T, text_dim); rows that are zero in every sample are padding.
        text_len: rows that the network was trained with.
    """
    places = (text != 0).any(dim=(0, 2)).nonzero()  # in order
    used = int(places[-1]) + 1 if len(places) else 0
    padding = max(text_len, text.shape[1]) - used
    standins = MIN_STANDINS + (-used - MIN_STANDINS) % KEY_MULTIPLE
    if padding <= standins:
        return TextTokens(x=F.pad(text, (0, 0, 0, max(text_len - text.shape[1], 0))), bias=None)
    bias = torch.cat([torch.zeros(used), standin_scores(padding, standins)])
    return TextTokens(
        x=F.pad(text[:, :used], (0, 0, 0, standins)), bias=bias.view(1, 1, 1, -1).to(text.device)
    )


def standin_scores(padding: int, standins: int) -> Tensor:
    """Scores (standins,) whose exponentials add up to ``padding``, each exact in bfloat16."""
    scores, left = [], float(padding)
    for remaining in range(standins, 0, -1):
        # All but the last few take an equal share; each of the rest takes what is left, rounded down.
        share = left / remaining if remaining > MIN_STANDINS else left
        score = _round_down(math.log(share)) if left > 0 else float("-inf")
        scores.append(score)
        left -= math.exp(score)
    return torch.tensor(scores)


def _round_down(value: float) -> float:
    rounded = torch.tensor(value, dtype=torch.float64).to(torch.bfloat16)
    while rounded.double() > value:
        rounded = torch.nextafter(rounded, torch.tensor(-torch.inf, dtype=torch.bfloat16))
    return float(rounded)

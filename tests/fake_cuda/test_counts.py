"""What a step, an encode and a decode ask of a GPU does not rise above benchmarks/results/counts.jsonl.

A figure is held where the file has a row of this version of torch (its first two numbers), the last one of
its name: launches and bytes of the same code differ a little between versions, and so do the kernels that
Inductor makes. Where torch is another, only the waits and the copies are held, which are ours. After a change
with a reason, `python benchmarks/counts.py` adds new rows.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks import counts
from benchmarks.common import RESULTS
from benchmarks.counting import Counted, counted
from tests.fake_cuda import controls

IN_DEFAULT = ("DiT toy: guided step, bf16, resident, eager", "DiT toy: guided step, bf16, streamed, eager")
CLOCK_BYTES = 1024  # a step's time, as numbers of a sinusoid, once for each walk through the blocks


@cache
def most_of_all() -> dict[str, dict[str, Any]]:
    """The last row of each figure that this version of torch has."""
    rows = map(json.loads, (RESULTS / "counts.jsonl").read_text().splitlines())
    version = minor(torch.__version__)
    return {row["figure"]: row for row in rows if minor(row["machine"]["torch"]) == version}


def minor(version: str) -> list[str]:
    return version.split(".")[:2]


def figures() -> list[Any]:
    names = counts.works()
    return [pytest.param(name, marks=() if name in IN_DEFAULT else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("figure", figures())
def test_no_count_rises(figure: str) -> None:
    controls.copies_move_bytes(False)
    found = counted(counts.works()[figure]())
    if "guided step" in figure:
        check_step(found, is_streamed="streamed" in figure)
    row = most_of_all().get(figure)
    if row is not None:
        risen = {name: (row[name], now) for name, now in found.as_numbers().items() if now > row[name]}
        assert not risen, "more than the row in benchmarks/results/counts.jsonl (before, now)"


def check_step(found: Counted, *, is_streamed: bool) -> None:
    """The host waits once, to see whether the latents are finite; weights come from locked memory alone."""
    assert found.syncs == 1
    assert found.pageable_bytes <= 2 * CLOCK_BYTES
    assert is_streamed or found.copies == 2

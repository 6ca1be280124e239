"""A few kills of `tests.kill_generate`; forty are for a machine that has nothing else to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill_generate import trials

pytestmark = pytest.mark.slow


def test_a_killed_run_makes_the_same_bytes_in_the_end(tmp_path: Path) -> None:
    found = list(trials(tmp_path, kills=4, seed=0, names=["unipc, 2 videos", "two experts, unipc, LoRA"]))
    assert len(found) == 4 and not [trial for trial in found if not trial.is_equal]

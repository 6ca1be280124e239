"""Parameters of tests that run on another simulated GPU than the usual one."""

from __future__ import annotations

from typing import Any

import pytest


def on_gpu(*values: object, capability: int = 90, devices: int = 1, is_slow: bool = True) -> Any:
    """A parameter of ``pytest.mark.parametrize``; without values it is the capability itself.

    Each kind of GPU is a process of its own, which takes seconds to start: only ``-m fake_cuda`` runs it.
    """
    marks = [pytest.mark.fake_cuda(capability=capability, devices=devices)]
    if is_slow:
        marks.append(pytest.mark.slow)
    return pytest.param(*(values or (capability,)), marks=marks, id=f"sm_{capability}x{devices}")

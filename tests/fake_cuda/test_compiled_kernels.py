"""The kernels that Inductor generates compute what the eager form computes, by Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.fake_cuda import interpreted

# Both compute in float32, in another order of sums, and round once at the end: a step up or down. The
# interpreter cuts to bfloat16 where a GPU rounds, which is no more.
BF16_STEPS = 1.0


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """In steps of bfloat16, by case."""
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "DIFFSYNTH_COMPILE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", interpreted.__name__], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", interpreted.cases())
def test_a_generated_kernel_is_within_a_step_of_the_eager_form(
    case: str, differences: dict[str, float]
) -> None:
    assert differences[case] <= BF16_STEPS

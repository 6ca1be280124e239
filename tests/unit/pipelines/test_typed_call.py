"""What editors and type checkers know of ``pipe(...)`` is what the call takes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffsynth.pipelines import typed_call
from diffsynth.pipelines.call_stub import TARGET, stub
from diffsynth.pipelines.wan_video import WanVideoPipeline

REPOSITORY = Path(__file__).parents[3]
# a typing mistake, a value of another type, and one that is no choice
MISTAKES = """
pipe("a cat", num_frame=9)
pipe("a cat", height="tall")
pipe("a cat", fit="cut")
"""


def test_the_typed_call_is_that_of_todays_declarations() -> None:
    assert TARGET.read_text(encoding="utf-8") == stub(), "run: python -m diffsynth.pipelines.call_stub"


def test_the_typed_call_has_the_parameters_of_the_real_one() -> None:
    typed = list(inspect.signature(typed_call.call).parameters.values())
    real = list(inspect.signature(WanVideoPipeline.__call__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in typed] == [(p.name, p.kind, p.default) for p in real]


@pytest.mark.slow
def test_a_type_checker_finds_mistakes_and_passes_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(code + MISTAKES, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports",
         "--cache-dir", tmp_path / "cache", script],
        env={"MYPYPATH": str(REPOSITORY)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = code.count("\n")
    errors = re.findall(r"^script\.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert [int(line) - last - 1 for line, _ in errors] == [1, 2, 3], done.stdout
    assert 'did you mean "num_frames"?' in errors[0][1]

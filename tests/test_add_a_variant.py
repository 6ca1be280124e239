"""docs/add_a_variant.md shows the code as it is, and names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "add_a_variant.md").read_text(encoding="utf-8")
EXCERPTS = re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, re.S)


def test_every_block_of_python_names_its_file() -> None:
    assert len(EXCERPTS) == GUIDE.count("```python") >= 8


@pytest.mark.parametrize(("file", "code"), EXCERPTS)
def test_an_excerpt_is_what_stands_in_its_file(file: str, code: str) -> None:
    assert code in (ROOT / file).read_text(encoding="utf-8"), (
        f"{file} has changed; bring the guide up to date"
    )


def test_the_files_that_it_names_are_there() -> None:
    for name in re.findall(r"`([\w/]+\.(?:py|md|gz|json))`", GUIDE):
        places = [
            ROOT,
            *(ROOT / "diffsynth" / part for part in (".", "models/wan", "denoising", "pipelines")),
        ]
        places.append(ROOT / "tests" / "data" / "checkpoints")
        assert any((place / name).is_file() for place in places), f"{name} is not there"


def test_the_lengths_that_it_tells_are_true() -> None:
    told = re.search(r"two new files \((\d+) and (\d+) lines\)", GUIDE)
    files = ("models/wan/adapters/speed.py", "conditioning/speed.py")
    counted = [(ROOT / "diffsynth" / file).read_text(encoding="utf-8").count("\n") for file in files]
    assert told is not None and [int(number) for number in told.groups()] == counted

"""``diffsynth generate`` with one expert of a pair: refused before anything loads, unless it is meant."""

from __future__ import annotations

from pathlib import Path

from diffsynth import read_metadata
from diffsynth.models.toy import toy_files
from tests.unit.cli.running import Shell


def test_one_expert_is_refused_before_anything_loads_unless_it_is_meant(shell: Shell, tmp_path: Path) -> None:
    high, low, *others = toy_files("t2v", num_experts=2)
    words = ["--device", "cpu", "--dtype", "float32"]
    for path in (low, *others):
        words += ["--model", path]
    made = tmp_path / "v.mp4"
    refused = shell("generate", "a ball", *words, "--out", made)
    assert refused.status == 1 and "Loaded" not in refused.err
    assert "is the low-noise expert of a pair, and the high-noise one" in refused.err
    assert "take every step: --single-expert." in refused.err and not made.exists()
    picked = shell("generate", "a ball", *words, "--out", made, "--model", high, "--dit", high)
    assert picked.status == 1 and "is the high-noise expert of a pair" in picked.err
    done = shell("generate", "a ball", *words, "--out", made, "--single-expert")
    assert done.status == 0, done.err
    assert read_metadata(made)["single_expert"] is True
    refined = shell("refine", "--from", made, *words, "--out", tmp_path / "w.mp4")  # as the file tells
    assert refined.status == 0, refined.err

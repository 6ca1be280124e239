"""Every benchmark runs at toy size, so that none can rot; their numbers are not looked at."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "date",
    "command",
    "commit",
    "dirty",
    "machine",
    "figure",
    "unit",
    "ours",
    "peer_name",
    "peer",
    "ratio",
    "notes",
}

CALLS = [
    pytest.param(
        "dit_step.py", ["--toy", "--layers", "1", "--grid", "1,8,8", "--real-tokens", "20,512"], id="dit_step"
    ),
    pytest.param("rope.py", ["--grid", "2,4,4", "--heads", "2"], id="rope"),
    pytest.param(
        "vae.py", ["--toy", "--size", "2,4,4", "--chunk-latents", "1,all", "--only", "time"], id="vae"
    ),
    pytest.param("overhead.py", [], id="overhead"),
    pytest.param("lora_fuse.py", ["--dim", "160", "--ffn-dim", "256", "--rank", "4"], id="lora_fuse"),
    pytest.param("micro.py", ["--scale", "0.02"], id="micro", marks=pytest.mark.slow),
    pytest.param("dataset_check.py", ["--clips", "4"], id="dataset_check"),
    pytest.param("cache.py", ["--clips", "3", "--size", "32", "--frames", "5"], id="cache"),
]


def run(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "benchmarks" / script
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(path), run_name="__main__")


def rows_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def check(file: Path) -> None:
    rows = rows_of(file)
    assert rows
    for row in rows:
        assert row.keys() >= FIELDS
        assert not (row["peer"] and row["peer_name"] is None)
        assert "/" not in str(row["command"]).removeprefix("python benchmarks/"), (
            "a path of this machine is in the row"
        )


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """Some scripts quieten the log."""
    logger = logging.getLogger("diffsynth")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(("script", "words"), CALLS)
def test_benchmark_writes_rows(
    script: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    file = tmp_path / "rows.jsonl"
    run(script, [*words, "--repeats", "1", "--out", str(file), "--threads", "1"], monkeypatch)
    check(file)


def test_profiles_name_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    run(
        "dit_step.py",
        ["--toy", "--layers", "1", "--grid", "1,8,8", "--dtypes", "float32", "--profile"],
        monkeypatch,
    )
    assert "addmm" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["dit-toy", "vae-toy"])
def test_made_checkpoints_are_equal_in_every_layout(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffsynth.models.model_manager import ModelManager

    for words in ([], ["--layout", "diffusers"], ["--format", "pth"]):
        run("make_checkpoint.py", [str(tmp_path), "--what", what, *words], monkeypatch)
    files = [
        tmp_path / what / "diffusion_pytorch_model.safetensors",
        tmp_path / f"{what}-diffusers" / "diffusion_pytorch_model.safetensors",
        tmp_path / what / "model.pth",
    ]
    first, *others = (
        ModelManager(torch_dtype=None, device="cpu").load_models([file]).model[0].state_dict()
        for file in files
    )
    for other in others:
        assert other.keys() == first.keys()
        assert all(other[name].equal(first[name]) for name in first)


def test_inspect_is_timed_on_a_file_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    run(
        "load.py",
        [str(tmp_path), "--what", "dit-toy", "--only", "inspect", "--repeats", "1", "--out", str(file)],
        monkeypatch,
    )
    check(file)
    sparse = tmp_path / "dit-14b" / "diffusion_pytorch_model.safetensors"
    assert sparse.stat().st_size > 20 * 2**30
    assert sparse.stat().st_blocks * 512 < 2**20


@pytest.mark.slow
def test_load_and_memory_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    file = tmp_path / "rows.jsonl"
    run("load.py", [str(tmp_path), "--what", "dit-toy", "--repeats", "1", "--out", str(file)], monkeypatch)
    run(
        "vae.py",
        ["--toy", "--only", "memory", "--memory-size", "4,4", "--repeats", "1", "--out", str(file)],
        monkeypatch,
    )
    check(file)

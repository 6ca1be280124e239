"""The GPU benchmarks run on the CPU at toy size, and their baselines compute the same networks as ours."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import installed
from benchmarks.gpu import all as all_parts
from benchmarks.gpu.diffsynth_dit import PlainDiT, manage
from benchmarks.gpu.diffsynth_vae import TiledDecoder
from benchmarks.gpu.diffusers_peers import diffusers_dit, forward_of
from benchmarks.gpu.fp8 import store_in_fp8
from benchmarks.gpu.shared import SIZES, Recorder, inputs_for, random_dit, stepping
from benchmarks.gpu.streams import StreamedDiT
from benchmarks.gpu.vae import random_vae

CPU = torch.device("cpu")
FIELDS = {
    "date",
    "command",
    "commit",
    "machine",
    "figure",
    "unit",
    "ours",
    "peer_name",
    "peer",
    "ratio",
    "notes",
}
# What a CPU cannot do: a side stream, and products in fp8.
EXPECTED_ERRORS = ("cuda", "fp8_compute is 'fp8'", "not installed", "using streams")


@pytest.mark.parametrize(
    ("script", "num_figures"),
    [
        pytest.param("dit", 16, id="dit"),
        pytest.param("fp8", 4, id="fp8"),
        pytest.param("vae", 3, id="vae"),
        pytest.param("experts", 2, id="experts"),
        pytest.param("v1_configurations", 10, id="v1_configurations"),
        pytest.param("train_step", 7, id="train_step"),
    ],
)
def test_script_writes_rows(script: str, num_figures: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    module = importlib.import_module(f"benchmarks.gpu.{script}")
    module.main(["--toy", "--repeats", "1", "--device", "cpu", "--out", str(file), "--commit", "abc"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    errors = [row for row in rows if "error" in row]
    assert all(row.keys() >= FIELDS for row in rows)
    assert all(row["command"].startswith(f"python -m benchmarks.gpu.{script} --toy") for row in rows)
    assert str(tmp_path) not in file.read_text()
    assert {row["commit"] for row in rows} == {"abc"}
    for row in errors:
        assert any(text in row["error"].lower() for text in EXPECTED_ERRORS), row["error"]
    assert len(rows) - len(errors) >= num_figures


@pytest.mark.parametrize("num_persistent", [None, 1_500_000, 0], ids=["all", "some", "none"])
def test_baseline_dit_gives_our_velocity(num_persistent: int | None) -> None:
    dit = random_dit("toy", CPU, torch.float32)
    inputs = inputs_for(dit, SIZES["toy"], CPU)
    with torch.no_grad():
        ours = stepping(dit, inputs, 1)()[0]
        peer = PlainDiT.sharing(dit)
        manage(peer, CPU, num_persistent)
        theirs = peer(inputs.latents, inputs.timestep, inputs.text)
    # float32, the same sums in another order
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_baseline_leaves_the_rest_in_host_memory() -> None:
    dit = random_dit("toy", CPU, torch.bfloat16)
    peer = PlainDiT.sharing(dit)
    first = sum(p.numel() for p in (*peer.patch_embedding.parameters(), *peer.text_embedding.parameters()))
    meta = torch.device("meta")  # stands for a GPU: what stays is moved to it
    manage(peer, meta, first)
    assert peer.patch_embedding.layer.weight.device == meta
    assert peer.time_embedding[0].layer.weight.device == CPU
    assert peer.blocks[0].modulation.device == CPU
    assert dit.patch_embedding.weight.device == CPU


def test_diffusers_twin_gives_our_velocity() -> None:
    pytest.importorskip("diffusers")
    dit = random_dit("toy", CPU, torch.float32)
    inputs = inputs_for(dit, SIZES["toy"], CPU)
    with torch.no_grad():
        theirs = forward_of(diffusers_dit(dit), inputs, torch.float32)()
        torch.testing.assert_close(theirs, stepping(dit, inputs, 1)()[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "tiles", [{}, {"tile_size": (4, 4), "tile_stride": (2, 2)}], ids=["one-tile", "tiled"]
)
def test_baseline_vae_gives_our_video(tiles: dict[str, tuple[int, int]]) -> None:
    vae = random_vae(CPU, is_toy=True, dtype=torch.float32)
    latents = torch.randn(1, 16, 3, 5, 5)
    with torch.no_grad():
        ours = vae.decode(latents, **tiles).clamp(-1, 1)
        torch.testing.assert_close(TiledDecoder(vae, **tiles)(latents), ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_arrangements_give_equal_velocities(storage: str) -> None:
    dit = random_dit("toy", CPU)
    if storage == "fp8":
        store_in_fp8(dit)
    inputs = inputs_for(dit, SIZES["toy"], CPU)
    with torch.no_grad():
        plain = stepping(dit, inputs, 2)()
        streamed = StreamedDiT(dit, CPU)
        for resident in ((), (1,), range(4)):
            streamed.arrange(resident)
            for got, wanted in zip(stepping(dit, inputs, 2, keeps_keys=False)(), plain, strict=True):
                assert got.equal(wanted)
        streamed.arrange()
        streamed.copier.take_rates()
        stepping(dit, inputs, 1)()
        assert len(streamed.copier.take_rates()) >= 4
        streamed.close()
        assert stepping(dit, inputs, 2)()[0].equal(plain[0])


def test_failed_contender_leaves_a_row_and_no_tensors(tmp_path: Path) -> None:
    recorder = Recorder(command="", out=tmp_path / "rows.jsonl", device=CPU, commit_name="abc")

    class Weights:
        alive = 0

        def __init__(self) -> None:
            Weights.alive += 1

        def __del__(self) -> None:
            Weights.alive -= 1

    def contender() -> None:
        held = Weights()
        raise RuntimeError(f"out of memory\nwith {type(held).__name__} and a long story")

    assert recorder.attempt("a figure", contender) is None
    assert Weights.alive == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert (row["figure"], row["error"]) == ("a figure", "RuntimeError: out of memory")
    assert recorder.attempt("another", lambda: 3) == 3


def test_missing_peer_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.diffusers_peers.installed", lambda name: None)
    recorder = Recorder(command="", out=tmp_path / "rows.jsonl", device=CPU, commit_name="abc")
    dit = random_dit("toy", CPU)
    assert recorder.attempt("a figure", lambda: diffusers_dit(dit)) is None
    assert "not installed" in (tmp_path / "rows.jsonl").read_text()
    assert installed("torch") is not None


NAMES = [part.name for part in all_parts.PARTS]


def test_nine_minutes_hold_the_parts_that_tell_most() -> None:
    now, later = all_parts.choose(all_parts.PARTS, seconds=540, slower=1.0)
    assert [part.name for part in now] == ["480P", "streamed", "fp8", "vae", "train"]
    assert [part.name for part in (*now, *later)] == NAMES


def test_parts_that_do_not_fit_are_put_off() -> None:
    now, later = all_parts.choose(all_parts.PARTS, seconds=330, slower=1.0)
    assert [part.name for part in now] == ["480P", "streamed", "vae"]
    assert [part.name for part in later] == [
        name for name in NAMES if name not in ("480P", "streamed", "vae")
    ]
    assert all_parts.choose(all_parts.PARTS, seconds=400, slower=10.0)[0] == []


def test_all_names_the_parts_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        all_parts.main(["--out", str(tmp_path), "--parts", "vea"])
    assert f"known: {', '.join(NAMES)}" in capsys.readouterr().err
    assert all_parts.main(["--out", str(tmp_path), "--minutes", "0"]) == 0
    assert f"no time for: --parts {','.join(NAMES)}" in capsys.readouterr().out


@pytest.mark.parametrize("part", all_parts.PARTS, ids=lambda part: part.name)
def test_a_scripts_own_parser_takes_the_words_of_a_part(part: all_parts.Part, monkeypatch) -> None:
    module = importlib.import_module(f"benchmarks.gpu.{part.script}")
    reached = []

    def stop(*given: object) -> None:
        reached.append(given)
        raise SystemExit(0)

    monkeypatch.setattr(module, "recorder", stop)
    with pytest.raises(SystemExit, match="0"):
        module.main(list(part.words))
    assert reached


def test_part_that_fails_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = argparse.Namespace(out=tmp_path, toy=True, commit=None, device="cpu")
    part = all_parts.PARTS[0]
    for code, ending in (
        ("raise SystemExit(3)", "exit status 3"),
        ("import time; time.sleep(9)", "time limit"),
    ):
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(all_parts, "command_of", lambda *_, command=command: command)
        assert ending in all_parts.run(part, given, 0.3)


@pytest.mark.slow
def test_all_runs_every_part(tmp_path: Path) -> None:
    assert all_parts.main(["--toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    scripts = {part.script for part in all_parts.PARTS}
    assert {file.name for file in tmp_path.iterdir()} == {f"gpu_{script}.jsonl" for script in scripts}


@pytest.mark.gpu
def test_copies_are_timed_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    dit = random_dit("toy", device)
    inputs = inputs_for(dit, SIZES["toy"], device)
    with torch.no_grad():
        plain = stepping(dit, inputs, 1)()[0]
        streamed = StreamedDiT(dit, device)
        assert stepping(dit, inputs, 1)()[0].equal(plain)
        assert all(rate > 0 for rate in streamed.copier.take_rates())
        streamed.close()

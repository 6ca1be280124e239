"""How the command ends: one message, a status that tells, and no work lost for a line about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from diffsynth.cli.ending import plain_errors
from diffsynth.tiny import tiny_folder
from tests.unit.cli.running import Shell

REPOSITORY = Path(__file__).parents[3]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="a device that is always full, of Linux")


def run(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, with ``D`` for the command."""
    command = f"D() {{ {sys.executable} -m diffsynth $*; }}; {line}"
    return subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@needs_full
def test_output_that_cannot_be_written_is_told_in_one_line() -> None:
    done = run(f"D inspect {tiny_folder()} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: The output of this command cannot be written: No space left on device.\n"


def test_a_reader_that_left_is_told_by_the_status_alone() -> None:
    done = run(f"D inspect {tiny_folder()} | exec sleep 0; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (1, "")


def test_closed_streams_are_no_fault() -> None:
    assert run("D --version >&-").returncode == 0
    assert run("D inspect nowhere >&- 2>&-").returncode == 1
    assert run("D inspect nowhere <&- 2>&-").returncode == 1


@needs_full
def test_a_log_on_a_full_disk_costs_no_video(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = ("a red circle", "--steps", 1, "--num-frames", 1, "--num-videos-per-prompt", 2)
    with FULL.open("w") as out, FULL.open("w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert shell("generate", *line, "--out", tmp_path / "a.png").status == 1, "the output is not whole"
    assert {path.name for path in tmp_path.iterdir()} == {"a-1.png", "a-2.png"}


def test_a_name_that_is_not_utf_8_breaks_no_line(shell: Shell) -> None:
    ran = shell("inspect", "\udce9.safetensors")
    assert ran.status == 1 and "does not exist" in ran.err


def test_an_error_of_the_system_names_the_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(typer.Exit), plain_errors():
        (tmp_path / "none.txt").read_text()
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}/none.txt: No such file") and err.count("\n") == 1


def test_what_nobody_foresaw_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), plain_errors():
        raise KeyError("unforeseen")
    err = capsys.readouterr().err
    assert "Traceback" in err and "KeyError: 'unforeseen'" in err
    assert err.splitlines()[-1].startswith("error: This is a fault of diffsynth")
    with pytest.raises(OSError), plain_errors(debug=True):
        raise OSError("shown")

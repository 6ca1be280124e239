"""Systems that lack what POSIX has."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffsynth import portable
from diffsynth.portable import is_alive, kill_with_children, peak_memory_bytes

REPOSITORY = Path(__file__).parents[2]
HIDDEN = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog")


# The imports of others come first, and find what they ask for; ours do not.
TRAIN_WITHOUT_POSIX = """
import signal, sys
from pathlib import Path
import av, ftfy, lightning, PIL.Image, sentencepiece, tokenizers, tqdm, typer, yaml
sys.modules.update(dict.fromkeys({hidden!r}))
sigusr1 = signal.SIGUSR1
del signal.SIGUSR1
from diffsynth.portable import SAVE_SIGNAL, peak_memory_bytes
signal.SIGUSR1 = sigusr1  # Lightning asks for it where it does not see Windows
assert SAVE_SIGNAL is None and peak_memory_bytes() is None
from diffsynth.training.run import train
from tests.unit.training.toy_runs import config_of, rows, toy_settings
folder = Path({folder!r})
report = train(config_of(toy_settings(folder), folder / "out", run=dict(steps=2, batch_size=1)))
assert report.step == 2 and rows(report)[-1]["peak_gb"] == ""
"""
WITHOUT_POSIX = """
import os, sys
import av, numpy, PIL.Image, safetensors.torch, sentencepiece
import ftfy, tokenizers, torch, tqdm, typer
sys.modules.update(dict.fromkeys({hidden!r}))
for name in ("geteuid", "getuid", "link", "mkfifo", "sysconf"):
    delattr(os, name)
from diffsynth.cli.app import main
for sys.argv in {lines!r}:
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, sys.argv
"""


def test_the_command_needs_no_posix_module(tmp_path: Path) -> None:
    from diffsynth.tiny import tiny_folder

    out = tmp_path / "v.mp4"
    generate = ["generate", "a red circle", "--steps", "1", "--num-frames", "5", "--out", str(out)]
    lines = [["diffsynth", *words] for words in (generate, ["inspect", str(tiny_folder())])]
    code = WITHOUT_POSIX.format(hidden=HIDDEN, lines=lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size and "wan_video_vae" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="hides what Windows has not")
def test_encoding_and_training_need_no_posix_module(tmp_path: Path) -> None:
    code = TRAIN_WITHOUT_POSIX.format(hidden=HIDDEN, folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_process_is_alive_until_it_has_ended() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert is_alive(process.pid) and is_alive(os.getpid())
    kill_with_children(process)
    assert not is_alive(process.pid)
    assert not is_alive(0) and not is_alive(-1) and not is_alive(10**30)


@pytest.mark.parametrize(
    ("handle", "error", "code", "expected"),
    [(7, 0, 259, True), (7, 0, 1, False), (0, 87, 0, False), (0, 5, 0, True)],
    ids=["running", "ended", "no-such-process", "of-another-user"],
)
def test_windows_is_asked_without_a_signal(
    monkeypatch: pytest.MonkeyPatch, handle: int, error: int, code: int, expected: bool
) -> None:
    class Kernel:
        class OpenProcess:
            def __new__(cls, *_: Any) -> Any:
                return handle or None

        def GetExitCodeProcess(self, _: Any, place: Any) -> None:
            place._obj.value = code

        def CloseHandle(self, _: Any) -> None:
            pass

    monkeypatch.setattr(portable.sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: Kernel(), raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: error, raising=False)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("on Windows this is Ctrl-C"))
    assert is_alive(1234) is expected


def test_the_peak_is_told_in_bytes() -> None:
    peak = peak_memory_bytes()
    assert peak is None or 10e6 < peak < 1e12

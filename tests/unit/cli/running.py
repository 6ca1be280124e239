"""Runs the command in this process, as a shell would."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffsynth.cli.app import main


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


def latents_of(video: Path) -> Path:
    """The one file of latents beside a video; its name holds the id of the run."""
    (found,) = video.parent.glob(f"{video.stem}.*.latents.safetensors")
    assert re.fullmatch(rf"{re.escape(video.stem)}\.[0-9a-f]{{8}}\.latents\.safetensors", found.name)
    return found


class Shell:
    """``shell("generate", "a cat")`` gives status, stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ran:
        self._monkeypatch.setattr(sys, "argv", ["diffsynth", *map(str, arguments)])
        self._capsys.readouterr()
        handlers = list(logging.getLogger("diffsynth").handlers)
        with pytest.raises(SystemExit) as ended:
            main()
        assert logging.getLogger("diffsynth").handlers == handlers, "the log is left as it was"
        written = self._capsys.readouterr()
        return Ran(int(ended.value.code or 0), written.out, written.err)

"""The doctor looks at everything, breaks on nothing, and says how to mend what is missing."""

from __future__ import annotations

import json
import sys

import pytest

from diffsynth.cli.doctor import run_doctor


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    run_doctor(as_json=True)
    report = json.loads(capsys.readouterr().out)
    return {finding["name"]: finding for finding in report["findings"]} | {"ok": report["ok"]}


def test_doctor_sees_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    report = findings(capsys)
    assert report["torch"]["found"] and not report["torch"]["remedy"]
    assert "libx264" in report["H.264 (.mp4, .mkv)"]["found"]
    assert report["sdpa"]["found"] and report["RAM"]["found"].endswith("GiB free")
    run_doctor(as_json=False)
    text = capsys.readouterr().out
    assert all(name in text for name in report if name != "ok")


def test_doctor_names_the_command_that_mends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("av", "gradio", "ftfy"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
    report = findings(capsys)
    assert report["ok"] is False
    assert report["PyAV"]["found"] is None and report["PyAV"]["remedy"].endswith("pip install av")
    assert report["gradio"]["is_optional"] and "diffsynth[ui]" in report["gradio"]["remedy"]
    run_doctor(as_json=False)
    assert "-> not installed; it cleans prompts" in capsys.readouterr().out


def test_doctor_survives_a_broken_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = findings(capsys)
    assert report["torch"]["found"] is None and "pip install torch" in report["torch"]["remedy"]

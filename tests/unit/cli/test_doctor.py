"""The doctor looks at everything, breaks on nothing, and says how to mend what is missing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffsynth import __version__
from diffsynth.cli.doctor import run_doctor
from diffsynth.errors import install_extra

REPOSITORY = Path(__file__).parents[3]
FOLDERS = ("docs", "diffsynth", "train", "examples")


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
    for module in ("av", "lightning", "ftfy"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
    report = findings(capsys)
    assert report["ok"] is False
    assert report["PyAV"]["found"] is None and report["PyAV"]["remedy"].endswith("pip install av")
    assert report["lightning"]["is_optional"]
    assert report["lightning"]["remedy"].endswith(f"pip install -e '{REPOSITORY}[train]'")
    run_doctor(as_json=False)
    assert "-> not installed; it cleans prompts" in capsys.readouterr().out


def test_doctor_survives_a_broken_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = findings(capsys)
    assert report["torch"]["found"] is None and "pip install torch" in report["torch"]["remedy"]


def distribution(folder: Path, kind: str, version: str) -> None:
    """Metadata of an installed distribution named diffsynth."""
    place = folder / (f"diffsynth-{version}.dist-info" if kind == "dist" else "diffsynth.egg-info")
    place.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: diffsynth\nVersion: {version}\nSummary: of other people\n"
    (place / ("METADATA" if kind == "dist" else "PKG-INFO")).write_text(text)


def test_another_project_of_the_same_name_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    distribution(tmp_path, "dist", "99.1.7")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    report = findings(capsys)
    assert report["diffsynth-wan"]["found"].startswith(f"{__version__} in ")
    told = report["another diffsynth"]
    assert "99.1.7" in told["found"] and str(tmp_path) in told["found"] and "other people" in told["found"]
    assert "pip uninstall diffsynth, then install this one again" in told["remedy"] and told["is_optional"]


def test_old_metadata_in_a_checkout_is_no_false_alarm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    distribution(tmp_path, "egg", "98.0")
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr("diffsynth.cli.doctor.__file__", str(tmp_path / "diffsynth" / "cli" / "doctor.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "another diffsynth" not in findings(capsys)


def texts() -> Iterator[tuple[Path, str]]:
    for pattern in ("README.md", "CONTRIBUTING.md", "setup.py", *(f"{folder}/**/*" for folder in FOLDERS)):
        for path in REPOSITORY.glob(pattern):
            if path.suffix in (".md", ".py", ".yaml"):
                yield path, path.read_text(encoding="utf-8")


def test_every_command_installs_this_project_and_extras_that_exist() -> None:
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    assert 'name="diffsynth-wan"' in setup, "diffsynth is the name of another project on the public index"
    extras = set(re.findall(r'^        "(\w+)": [A-Z]+,$', setup, re.MULTILINE))
    assert {"train", "control", "dev"} <= extras and "ui" not in extras
    for path, text in texts():
        assert not re.search(r"pip install[^\n]*\bdiffsynth\[", text), path
        named = re.findall(r"pip install[^\n]*'\.\[(\w+)\]'", text)
        named += re.findall(r'install_extra\("(\w+)"\)', text)
        assert set(named) <= extras, f"{path} names {set(named) - extras}"


def test_the_command_for_an_extra_fits_where_the_package_lies(tmp_path: Path) -> None:
    assert install_extra("train") == f"pip install -e '{REPOSITORY}[train]'"
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "setup.py").touch()
    assert install_extra("train", tmp_path / "a b" / "diffsynth") == f"pip install -e '{tmp_path}/a b[train]'"
    assert "pip install '.[train]'" in install_extra("train", tmp_path / "site-packages" / "diffsynth")

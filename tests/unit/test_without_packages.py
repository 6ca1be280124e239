"""Packages that are not there: what can be done without them works, the rest says what to install."""

from __future__ import annotations

import importlib
import random
import re
import string
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from diffsynth.cli import app
from diffsynth.cli.ending import plain_errors
from diffsynth.conditioning.text import clean_prompt
from diffsynth.errors import MissingPackageError
from diffsynth.video import VideoData, VideoWriter, read_metadata, save_frames, save_image
from diffsynth.video.probing import probe_media


@pytest.fixture
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, request.param, None)  # importing it now fails


@pytest.mark.parametrize("without", ["ftfy"], indirect=True)
@pytest.mark.usefixtures("without")
def test_a_prompt_of_plain_ascii_needs_no_ftfy() -> None:
    assert clean_prompt("  a cat's\t(wet) \n coat, 4k! ") == "a cat's (wet) coat, 4k!"
    for text in ("a cafÃ©", "色调艳丽", "a &amp; b", "a\x1b[31m b"):
        with pytest.raises(MissingPackageError, match="pip install ftfy"):
            clean_prompt(text)


def test_a_prompt_that_is_cleaned_without_ftfy_is_as_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    letters = [letter for letter in string.printable if letter not in "&\x0b\x0c"]
    texts = ["".join(draw.choices(letters, k=draw.randint(0, 40))) for _ in range(200)]
    texts += ["``quoted'' --  ...", "<b>x</b> %20 \\u00e9", "a\r\nb\rc"]
    short = [clean_prompt(text) for text in texts]
    monkeypatch.setattr("diffsynth.conditioning.text._NOTHING_TO_MEND", re.compile("x{99}"))
    assert short == [clean_prompt(text) for text in texts]


@pytest.mark.parametrize("without", ["av"], indirect=True)
@pytest.mark.usefixtures("without")
def test_pictures_need_no_pyav_and_videos_name_it(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), "red")
    save_image(picture, tmp_path / "a.png", metadata={"seed": 1})
    save_frames([picture] * 3, tmp_path / "frames")
    assert len(VideoData(image_folder=str(tmp_path / "frames"))) == 3
    assert read_metadata(tmp_path / "a.png")["seed"] == 1 and probe_media(tmp_path / "a.png")
    video = tmp_path / "a.mp4"
    video.write_bytes(b"anything")
    for work in (
        lambda: VideoWriter(tmp_path / "b.mp4", fps=16),
        lambda: VideoData(str(video))[0],
        lambda: read_metadata(video),
        lambda: probe_media(video),
    ):
        with pytest.raises(MissingPackageError, match=r"pip install av$"):
            work()


@pytest.mark.parametrize(("module", "package"), [("yaml", "pyyaml"), ("PIL.Image", "pillow"), ("av", "av")])
def test_the_command_names_the_package_that_brings_a_module(
    module: str, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit), plain_errors():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith(f"pip install {package}\n")
    with pytest.raises(ModuleNotFoundError), plain_errors(debug=True):
        raise ModuleNotFoundError(name=module)


def test_a_module_of_our_own_that_is_missing_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), plain_errors():
        importlib.import_module("diffsynth.nothing_here")
    assert "Traceback" in capsys.readouterr().err


def test_what_reads_the_line_may_miss_a_package_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr(app, "app", parse)
    monkeypatch.setattr(sys, "argv", ["diffsynth", "doctor"])
    with pytest.raises(SystemExit, match="1"):
        app.main()
    assert capsys.readouterr().err.endswith("pip install pydantic\n")

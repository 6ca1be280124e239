"""Names inside foreign files: what they mean, and what is never opened."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from diffsynth.checkpoints.named import find_named, is_tiny, name_of, places_for, printable, with_shards
from diffsynth.tiny import tiny_folder

DIT = "Wan2.1-T2V-1.3B/dit.safetensors"


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with a video in another."""
    (tmp_path / "work" / "models").mkdir(parents=True)
    write(tmp_path / "videos" / "v.mp4")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def found(name: object, work: Path) -> list[Path]:
    return [path.resolve() for path in find_named(name, places_for(work.parent / "videos" / "v.mp4"))]


def test_a_name_tells_the_model_and_no_path_of_this_machine() -> None:
    assert name_of("/home/me/models/Wan-AI/Wan2.1-T2V-1.3B/dit.safetensors") == DIT
    shards = "/m/Wan2.2-T2V-A14B/high_noise_model/dit-00001-of-00006.safetensors (+5 shards)"
    assert name_of(shards) == "Wan2.2-T2V-A14B/high_noise_model/dit-00001-of-00006.safetensors"
    tiny = name_of(tiny_folder() / "Wan_tiny_VAE.safetensors")
    assert tiny == "tiny:Wan_tiny_VAE.safetensors" and is_tiny(tiny) and not is_tiny(["tiny:"])
    assert find_named(tiny, []) == [tiny_folder() / "Wan_tiny_VAE.safetensors"]


@pytest.mark.parametrize(
    "place", ["", "models", "models/Wan-AI", "../videos"], ids=["here", "models", "organisation", "video"]
)
def test_a_name_is_found_where_the_user_works(place: str, work: Path) -> None:
    file = write(work / place / DIT)
    assert found(DIT, work) == [file.resolve()]


def test_a_model_is_found_from_inside_its_own_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(work / DIT)
    monkeypatch.chdir(file.parent)
    assert found(DIT, work) == [file]
    monkeypatch.chdir(write(work / "Other" / "dit.safetensors").parent)
    assert found(DIT, work) == [], "a file of the same name in another model's folder is another"


def test_two_files_of_one_name_are_both_told(work: Path) -> None:
    files = {write(work / DIT), write(work / "models" / DIT)}
    assert set(found(DIT, work)) == files
    assert len(found(DIT, work)) == 2


NO_NAMES = {
    "parent": "../secret.safetensors", "deep-parent": "a/../../secret.pth", "dot": "./dit.safetensors",
    "absolute": "/etc/secret.safetensors", "home": "~/secret.safetensors", "user": "~root/a.safetensors",
    "address": "https://host/a.safetensors", "hub-id": "Wan-AI/Wan2.1-T2V-1.3B", "drive": "C:/a.safetensors",
    "drive-relative": "C:a.safetensors", "share": "\\\\host\\share\\a.pth", "stream": "a.safetensors:b",
    "newline": "a\nb.safetensors", "escape": "\x1b[2J.safetensors", "null": "a\0.safetensors",
    "bidi": "a\u202eb.safetensors", "surrogate": "\udce9.safetensors", "empty": "", "doubled": "a//b.pth",
    "code": "models.py", "no-kind": "passwd", "deep": "a/b/c/d/e.safetensors", "long": "a" * 300 + ".pth",
    "number": 5, "none": None, "list": ["a.safetensors"], "mapping": {"a": "b.safetensors"},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES.values(), ids=NO_NAMES)
def test_what_is_no_plain_name_means_nothing(name: object, work: Path) -> None:
    if isinstance(name, str) and name and not name.startswith("/"):
        with suppress(OSError, ValueError):  # some of them can be no file at all
            write(work / name)
    assert found(name, work) == []


def test_a_pattern_means_the_file_of_that_very_name(work: Path) -> None:
    write(work / "style.safetensors")
    assert found("*.safetensors", work) == []
    assert found("style [v2].safetensors", work) == []
    file = write(work / "style [v2].safetensors")
    assert found("style [v2].safetensors", work) == [file]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_that_leads_out_is_not_followed(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = write(work.parent / "secret" / "dit.safetensors")
    (work / "Wan2.1-T2V-1.3B").symlink_to(secret.parent)
    assert found(DIT, work) == [] and "leads out of" in caplog.text
    (work.parent / "videos" / "style.safetensors").symlink_to(secret)
    (work / "models" / "loop.safetensors").symlink_to("loop.safetensors")
    (work / "models" / "organisation").symlink_to(secret.parent)
    assert [found(name, work) for name in ("style.safetensors", "loop.safetensors", "dit.safetensors")] == [
        []
    ] * 3
    inside = write(work / "real.safetensors")
    (work / "alias.safetensors").symlink_to(inside)
    assert found("alias.safetensors", work) == [inside]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes there")
def test_only_ordinary_files_are_opened(work: Path) -> None:
    os.mkfifo(work / "pipe.safetensors")
    (work / "folder.safetensors").mkdir()
    assert found("pipe.safetensors", work) == found("folder.safetensors", work) == []


def test_a_shard_brings_the_others_of_its_model(work: Path) -> None:
    names = [f"dit-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    files = [write(work / name) for name in names]
    write(work / "dit-00001-of-00002.safetensors")
    write(work / "vae-00001-of-00003.safetensors")
    assert with_shards(files[0]) == files and with_shards(work / "vae.pth") == [work / "vae.pth"]


def test_foreign_text_is_safe_on_a_terminal() -> None:
    assert printable("a\x1b[31m\nb\u202e\udce9") == "a?[31m?b??"
    assert printable("x" * 10**6, 20) == "x" * 20 + " ..."

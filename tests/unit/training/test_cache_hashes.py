from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffsynth.training import cache_hashes
from diffsynth.training.cache_hashes import INDEX, FileHashes


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is read, in order."""
    names: list[str] = []
    content_hash = cache_hashes.content_hash
    monkeypatch.setattr(
        cache_hashes, "content_hash", lambda path: (names.append(path.name), content_hash(path))[1]
    )
    return names


def learn(files: list[Path], folder: Path | None = None, rank: int = 0) -> list[str]:
    hashes = FileHashes(folder, rank)
    hashes.learn(files, 2, lambda _: None)
    return [hashes.digest(file) for file in files]


@pytest.mark.parametrize("apart", [False, True], ids=["beside", "in-a-folder"])
def test_only_changed_files_are_read_again(tmp_path: Path, hashed: list[str], apart: bool) -> None:
    files = [tmp_path / "media" / name for name in ("a.mp4", "b.mp4")]
    files[0].parent.mkdir()
    folder = tmp_path if apart else None
    for file in files:
        file.write_bytes(file.name.encode())
    first = learn(files, folder)
    assert learn(files, folder, rank=1) == first and sorted(hashed) == ["a.mp4", "b.mp4"]
    files[1].write_bytes(b"x.mp4")  # as long as before
    os.utime(files[1], ns=(1, 1))
    second = learn(files, folder)
    assert hashed[2:] == ["b.mp4"] and second[0] == first[0] and second[1] != first[1]


def test_equal_content_has_equal_hashes_and_a_damaged_index_is_no_harm(tmp_path: Path) -> None:
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for file in files:
        file.write_bytes(b"content")
    (tmp_path / f"{INDEX}-0.json").write_text('{"a.mp4": [7, 1')
    first, second = learn(files)
    assert first == second and len(first) == 32

"""Names belong to one running command at a time, and to none when its process is dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diffsynth.errors import OutputPathError
from diffsynth.video import VideoWriter
from diffsynth.video.claims import Claim, claim, claim_file
from diffsynth.video.paths import check_not_read, remove_leftovers, temporary_beside
from diffsynth.video.processes import has_ended, process_tag
from tests.pictures import noise

ROOT = Path(__file__).parents[3]
HIDE_LOCKS = "import sys; sys.modules['fcntl'] = None\n"
HOLD = """
import sys, time
from pathlib import Path
from diffsynth.video.claims import claim
print(claim(Path(sys.argv[1]), "00000001"), flush=True)
time.sleep(60)
"""
WRITE = """
import sys, time, numpy as np
from diffsynth.video import VideoWriter
writer = VideoWriter(sys.argv[1])
for _ in range(100):
    writer.write(np.random.randint(0, 256, (64, 64, 3), dtype=np.uint8))
print("written", flush=True)
time.sleep(60)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=["locks", "no locks"])
def prelude(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a process begins with; without locks, a claim is told by the process that it names."""
    if request.param == "locks":
        return ""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    return HIDE_LOCKS


@pytest.fixture
def start() -> Iterator[Start]:
    running = []

    def run(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        running.append(subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ))  # fmt: skip
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_claimed_name_is_free_when_its_process_is_killed(
    prelude: str, start: Start, tmp_path: Path
) -> None:
    video = tmp_path / "video.mp4"
    process = start(prelude + HOLD, video)
    assert told(process).startswith("Claim(")
    assert claim(video, "00000002") == "00000001", "the run that has it is told"
    assert names(tmp_path) == [".claim-video.mp4"], "no empty video stands for it"
    process.kill()  # SIGKILL: nothing can tidy up
    process.wait()
    found = claim(video, "00000002")
    assert isinstance(found, Claim)
    assert claim(video, "00000003") == "00000002", "nor has this process two claims of one name"
    found.release()
    assert names(tmp_path) == []


def test_of_several_at_once_one_takes_over_from_the_dead(tmp_path: Path) -> None:
    for round_ in range(5):
        video = tmp_path / f"{round_}.mp4"
        claim_file(video).write_text("999999999-000000000000 00000001")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i, video=video: claim(video, f"{i:08}"), range(8)))  # type: ignore[misc]
        assert sum(isinstance(each, Claim) for each in found) == 1


def test_a_number_that_another_process_got_since_is_no_sign_of_life(tmp_path: Path) -> None:
    number, _, mark = process_tag().partition("-")
    assert has_ended(f"{number}-{mark}") is False
    assert has_ended(f"{number}-{mark[:4]}00000000") is True, "this number, but begun at another time"
    assert has_ended(f"999999999-{mark}") is True
    assert has_ended(f"{number}-0000{mark[4:]}") is None, "of another machine"
    assert has_ended("") is None and has_ended("x-y") is None


def test_without_locks_the_claim_of_another_machine_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr("diffsynth.video.claims._PATIENCE_S", 0.05)
    video = tmp_path / "video.mp4"
    claim_file(video).write_text("17-0000aaaaaaaa 1a2b3c4d")
    remove_leftovers(tmp_path)
    assert claim(video, "00000002") == "1a2b3c4d" and names(tmp_path) == [".claim-video.mp4"]


def test_what_a_killed_process_leaves_goes_when_its_folder_is_written_again(
    start: Start, tmp_path: Path
) -> None:
    process = start(WRITE, tmp_path / "a.mp4")
    assert told(process) == "written"
    (part,) = names(tmp_path)
    assert part.startswith(f".part-{process.pid}-")
    kept = [tmp_path / ".part-notes", temporary_beside(tmp_path / "b.mp4"), tmp_path / ".part-17-x.mp4"]
    foreign, old = (tmp_path / f".part-17-0000aaaaaaaa-0000000{i}.mp4" for i in range(2))
    for path in (*kept, foreign, old):
        path.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    remove_leftovers(tmp_path)
    assert part in names(tmp_path), "its process lives"
    process.kill()
    process.wait()
    claim_file(tmp_path / "a.mp4").write_text("1-0")  # locked by nobody
    with VideoWriter(tmp_path / "c.mp4") as writer:
        writer.write(noise())
    assert names(tmp_path) == sorted([*(path.name for path in kept), foreign.name, "c.mp4"])


def test_a_file_that_comes_meanwhile_stays_and_the_new_one_gets_a_number(tmp_path: Path, caplog: Any) -> None:
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.overwrites = False
    writer.write(noise())
    (tmp_path / "a.mp4").write_bytes(b"mine")
    (tmp_path / "a_2.mp4").write_bytes(b"mine")
    writer.close()
    assert writer.path == tmp_path / "a_3.mp4" and "a.mp4 was taken meanwhile; this one is" in caplog.text
    assert (tmp_path / "a.mp4").read_bytes() == b"mine" and names(tmp_path) == ["a.mp4", "a_2.mp4", "a_3.mp4"]


def test_a_disk_without_hard_links_replaces_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FAT answers

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a.mp4").write_bytes(b"mine")
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.overwrites = False
    writer.write(noise())
    writer.close()
    assert names(tmp_path) == ["a.mp4", "a_2.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"mine"


def test_an_input_is_known_by_what_it_is(tmp_path: Path) -> None:
    source, folder = tmp_path / "in.mp4", tmp_path / "folder"
    folder.mkdir()
    for path in (source, folder / "1.png"):
        path.write_bytes(b"x")
    hard, soft, inside = tmp_path / "hard.mp4", tmp_path / "soft.mp4", tmp_path / "inside.png"
    os.link(source, hard)
    soft.symlink_to(source)
    os.link(folder / "1.png", inside)
    for path, read in ((source, source), (hard, source), (soft, source), (source, soft), (inside, folder)):
        with pytest.raises(OutputPathError, match=r"is the same file as .* which is read here"):
            check_not_read(path, [tmp_path / "absent", read])
    with pytest.raises(OutputPathError, match="is the same file"):
        check_not_read(source, [str(tmp_path / "*.mp4")])
    check_not_read(tmp_path / "new.mp4", [source])
    check_not_read(source, [folder])

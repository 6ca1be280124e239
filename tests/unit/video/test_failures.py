"""What cannot be written is refused early, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import (
    ArgumentError,
    OutputPathError,
)
from diffsynth.video import (
    VideoData,
    VideoWriter,
    check_output_path,
    save_image,
    save_video,
)
from tests.pictures import noise, numbered

BAD_OPTIONS = [
    pytest.param("a.mp4", {"quality": 5, "crf": 18}, "two names of one thing", id="quality-and-crf"),
    pytest.param("a.mp4", {"quality": 11}, r"give 1 \(smallest file\) to 10", id="quality-range"),
    pytest.param("a.mp4", {"crf": 52}, r"0 \(best\) to 51", id="crf-range"),
    pytest.param("a.mp4", {"codec": "libx26"}, "not in this build of ffmpeg", id="unknown-codec"),
    pytest.param(
        "a.webm", {"codec": "libx264"}, r"a \.webm file cannot hold libx264", id="codec-of-another-file"
    ),
    pytest.param("a.mp4", {"pix_fmt": "rgb24"}, "cannot hold 'rgb24'; it takes yuv420p", id="pixel-format"),
    pytest.param("a.mkv", {"codec": "ffv1", "crf": 3}, "has no quality scale", id="crf-of-a-lossless-codec"),
    pytest.param(
        "a.mp4", {"ffmpeg_params": ["-presett", "slow"]}, "no option presett", id="unknown-parameter"
    ),
    pytest.param(
        "a.mp4", {"ffmpeg_params": ["-preset", "sloow"]}, "does not start here", id="refused-parameter"
    ),
    pytest.param("a.mp4", {"ffmpeg_params": ["-preset"]}, "names and values in turn", id="half-a-parameter"),
    pytest.param("a.mp4", {"fps": 0}, "fps is 0", id="no-pace"),
    pytest.param("a.mp4", {"metadata": ["seed"]}, "mapping from names", id="metadata-of-no-names"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_wrong_options_are_found_before_the_first_frame(
    tmp_path: Path, name: str, options: dict, message: str
) -> None:
    frames = iter([noise()])
    with pytest.raises(ArgumentError, match=message):
        save_video(frames, tmp_path / name, **options)
    assert next(frames) is not None and os.listdir(tmp_path) == []


BAD_FRAMES = [
    pytest.param([noise(), noise(48, 66)], "frame 1 is 66x48, the first was 64x48", id="another-size"),
    pytest.param([], "no frame was given", id="none"),
    pytest.param([noise().astype(np.float32)], "must lie in", id="range-0-to-255"),
    pytest.param(torch.full((1, 3, 8, 8), float("nan")), "values from nan", id="nan"),
    pytest.param(torch.rand(2, 3, 8, 8) * 2 - 1, "must lie in", id="range-of-the-networks"),
    pytest.param([noise().astype(np.int64)], "an array of int64", id="integers"),
    pytest.param([[noise()]], "is a list; give one video at a time", id="a-batch"),
    pytest.param(torch.rand(1, 2, 3, 8, 8), "give one video", id="a-batch-tensor"),
    pytest.param([noise()[:, :, :2]], r"the shape \(48, 64, 2\)", id="two-channels"),
    pytest.param("video.mp4", "open a file first", id="a-path"),
    pytest.param([None], "of type NoneType", id="nothing"),
]


@pytest.mark.parametrize(("frames", "message"), BAD_FRAMES)
def test_wrong_frames_leave_nothing_behind(tmp_path: Path, frames: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        save_video(frames, tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_between_frames_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield from (noise(seed=number) for number in range(20))
        raise error("stop")

    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(error, match="stop"):
        save_video(frames(), tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


FULL_DISK = """
import resource, sys, numpy as np
from diffsynth.errors import OutputPathError
from diffsynth.video import save_frames, save_video
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
make = np.random.default_rng(0).integers
frames = (make(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(int(sys.argv[2])))
try:
    (save_frames if sys.argv[1].endswith("folder") else save_video)(frames, sys.argv[1])
except OutputPathError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on file size is POSIX")
@pytest.mark.parametrize("count", [2, 80], ids=["fails-in-close", "fails-in-write"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.gif"])
def test_a_disk_that_refuses_bytes_leaves_nothing_behind(tmp_path: Path, name: str, count: int) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / name), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert "File too large" in done.stdout and "Nothing half-written" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_full_disk_says_how_much_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = VideoWriter(tmp_path / "a.mp4")
    writer.write(noise())
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputPathError, match=r"after 1 frames: No space left.* MiB are free"):
        writer.close()
    with pytest.raises(OutputPathError, match="No space left"):
        save_image(noise(), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_writer_can_be_stopped_closed_twice_and_not_reopened(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.write(noise())
    writer.abort()
    assert os.listdir(tmp_path) == []
    writer.close()
    with pytest.raises(ArgumentError, match="already closed"):
        writer.write(noise())
    with VideoWriter(tmp_path / "b.mp4") as writer:
        writer.write(noise())
        assert not (tmp_path / "b.mp4").exists()
    writer.close()
    assert os.listdir(tmp_path) == ["b.mp4"] and writer.num_frames == 1


def test_output_paths_are_checked_before_the_work(tmp_path: Path) -> None:
    assert check_output_path(tmp_path / "new" / "folder" / "a.mp4").parent.is_dir()
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for path, message in {
        tmp_path / "folder.mp4": "is a folder",
        tmp_path / "a.mp5": r"extension '\.mp5'.*\.mp4",
        tmp_path / "video": "has no extension",
        tmp_path / "file" / "a.mp4": "cannot be written",
        tmp_path / f"{'x' * 300}.mp4": "cannot be written: File name too long",
    }.items():
        with pytest.raises(OutputPathError, match=message):
            check_output_path(path)
    with pytest.raises(OutputPathError, match=r"needs about .* MiB, but only .* MiB are free"):
        check_output_path(tmp_path / "a.mp4", need_bytes=2**60)
    with pytest.raises(OutputPathError, match="save_frames"):
        save_video([noise()], tmp_path / "a.png")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4", "new"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_before_the_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputPathError, match="Permission denied"):
        check_output_path(tmp_path / "a.mp4")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.mp4").symlink_to(tmp_path / "disk" / "b.mp4")
    save_video(numbered(2), tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").is_symlink() and len(VideoData(tmp_path / "disk" / "b.mp4")) == 2


def test_a_picture_that_cannot_be_read_is_not_called_a_full_disk(tmp_path: Path) -> None:
    save_image(noise(), tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(OSError, match="truncated") as caught:
        save_video([image], tmp_path / "a.mp4")
    assert not isinstance(caught.value, OutputPathError)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "cut.png"]

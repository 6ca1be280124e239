"""Writing: pictures come back as they were given, with their settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import (
    ArgumentError,
    MediaNotFoundError,
)
from diffsynth.video import (
    VideoData,
    read_metadata,
    save_video,
)
from diffsynth.video.encoding import choose_encoding
from tests.pictures import noise, numbered, numbered_frame, smooth

SAME_FRAMES = """
import sys
from diffsynth import save_video
from tests.pictures import smooth, noise
save_video([smooth(48, 80), noise(48, 80), smooth(48, 80)] * 3, sys.argv[1])
"""


def test_the_same_frames_make_the_same_file_whatever_memory_held_before(tmp_path: Path) -> None:
    made = []
    for filling in ("1", "170"):  # glibc fills memory that is given out with such bytes
        path = tmp_path / f"{filling}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": filling}
        subprocess.run(
            [sys.executable, "-c", SAME_FRAMES, path],
            env=environment,
            cwd=Path(__file__).parents[3],
            check=True,
        )
        made.append(path.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["a.mp4", "a.m4v", "a.mov", "a.mkv", "a.webm", "a.gif", "A.MP4"])
def test_settings_are_read_back_from_every_container(tmp_path: Path, name: str) -> None:
    settings = {
        "prompt": "a red circle, 红色的圆 «é»",
        "seed": 7,
        "cfg_scale": 5.0,
        "loras": [],
        "long": "x" * 70_000,
    }
    save_video(numbered(3), tmp_path / name, metadata={**settings, "path": Path("lora.safetensors")})
    assert read_metadata(tmp_path / name) == {**settings, "path": "lora.safetensors"}
    assert len(VideoData(tmp_path / name)) == 3


def test_a_file_without_our_settings_gives_none(tmp_path: Path) -> None:
    save_video(numbered(2), tmp_path / "a.mp4")
    assert read_metadata(tmp_path / "a.mp4") == {}
    with pytest.raises(MediaNotFoundError, match="does not exist"):
        read_metadata(tmp_path / "b.mp4")


# 4:4:4 at CRF 0 is lossless after the change to YUV, whose rounding costs up to 2 levels per channel;
# 4:2:0 averages colour over 2x2 pixels, worth 5 levels at most in this smooth picture, and PyAV before 18
# rounds carelessly.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"crf": 0, "pix_fmt": "yuv444p"}, 2, id="full-colour"),
        pytest.param({"crf": 0}, 8, id="shared-colour"),
        pytest.param({"quality": 9}, 12, id="the-default-quality"),
        pytest.param({"codec": "libx265", "crf": 4, "pix_fmt": "yuv444p"}, 6, id="h265"),
        pytest.param({"codec": "ffv1", "pix_fmt": "yuv444p"}, 2, id="ffv1"),
    ],
)
def test_colours_come_back_as_they_were(tmp_path: Path, options: dict, tolerance: int) -> None:
    picture = smooth()
    save_video([picture] * 3, tmp_path / "a.mkv", **options)
    back = np.asarray(VideoData(tmp_path / "a.mkv")[1]).astype(int)
    assert np.abs(back - picture.astype(int)).max() <= tolerance


def test_a_reader_that_knows_the_colour_tags_and_one_that_assumes_agree(tmp_path: Path) -> None:
    save_video([smooth()], tmp_path / "a.mp4", crf=0, pix_fmt="yuv444p")
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.colorspace == 6 and frame.color_range == 1
        assumed = frame.reformat(format="rgb24", src_colorspace="ITU601").to_ndarray().astype(int)
    assert np.abs(assumed - smooth().astype(int)).max() <= 2


def test_gif_keeps_flat_colours_and_its_pace(tmp_path: Path) -> None:
    save_video(numbered(8), tmp_path / "a.gif", fps=10, metadata={"seed": 1})
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 8 and image.info["loop"] == 0 and image.info["duration"] == 100
    assert np.array_equal(np.asarray(VideoData(tmp_path / "a.gif")[5]), numbered_frame(5))


@pytest.mark.parametrize("size", [(470, 830), (48, 64), (2, 2), (50, 98)])
def test_even_sizes_are_written_as_they_are(tmp_path: Path, size: tuple[int, int]) -> None:
    save_video([noise(*size)], tmp_path / "a.mp4")
    assert VideoData(tmp_path / "a.mp4").shape() == size


def test_odd_sizes_name_the_format_that_takes_them(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r'width 63 and height 47 .* pix_fmt="yuv444p"'):
        save_video([noise(47, 63)], tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []
    save_video([noise(47, 63)], tmp_path / "a.mp4", pix_fmt="yuv444p")
    assert VideoData(tmp_path / "a.mp4").shape() == (47, 63)
    save_video([noise(47, 63)], tmp_path / "a.gif")
    assert VideoData(tmp_path / "a.gif").shape() == (47, 63)


@pytest.mark.parametrize(("quality", "crf"), [(10, 0), (9, 5), (5, 25), (1, 45), (None, 5)])
def test_quality_is_the_crf_of_v1(quality: int | None, crf: int) -> None:
    assert choose_encoding(".mp4", quality=quality).options["crf"] == str(crf)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_a_higher_crf_makes_a_smaller_file(tmp_path: Path, name: str) -> None:
    sizes = []
    for crf in (5, 25, 45):
        save_video((noise(seed=number) for number in range(4)), tmp_path / name, crf=crf)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_frames_are_taken_one_at_a_time(tmp_path: Path) -> None:
    alive = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def frames() -> Iterator[np.ndarray]:
        nonlocal alive
        for number in range(60):
            frame = noise(seed=number).view(Counted)
            alive += 1
            assert alive <= 3, "save_video keeps frames that it has already written"
            yield frame

    save_video(frames(), tmp_path / "a.mp4")
    assert len(VideoData(tmp_path / "a.mp4")) == 60


def test_every_kind_of_frame_gives_the_same_video(tmp_path: Path) -> None:
    pictures = np.stack([noise(seed=number) for number in range(3)])
    reals = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    kinds = [
        pictures,
        list(pictures),
        [Image.fromarray(picture) for picture in pictures],
        reals,
        reals.numpy(),
        iter(reals.permute(0, 2, 3, 1).double().numpy()),
        torch.from_numpy(pictures),
    ]
    for number, frames in enumerate(kinds):
        save_video(frames, tmp_path / f"{number}.mp4", fps=Fraction(30000, 1001))
    files = [(tmp_path / f"{number}.mp4").read_bytes() for number in range(len(kinds))]
    assert all(file == files[0] for file in files)
    assert VideoData(tmp_path / "0.mp4").fps == pytest.approx(29.97, abs=1e-3)
    assert b"moov" in files[0][:64], "mp4 starts with its index, so that it plays while it loads"

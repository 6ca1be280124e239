"""Headers tell what decoding would: size, frames, rate, and that a file is cut short."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import diffsynth
from diffsynth.errors import MediaNotFoundError, MediaReadError
from diffsynth.video.probing import probe_media
from tests.pictures import noise, numbered, smooth, write_odd


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_the_header_tells_what_is_decoded(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    diffsynth.save_video(numbered(13), file, fps=10)
    facts, video = probe_media(file), diffsynth.VideoData(file)
    assert (facts.num_frames, facts.height, facts.width) == (len(video), *video.shape()) == (13, 48, 64)
    assert facts.fps == pytest.approx(10, rel=1e-6), "a rational number, in floats"
    assert facts.times_s is None and not facts.is_picture


def test_uneven_frames_tell_their_times(tmp_path: Path) -> None:
    ticks = [0, 1, 9, 10]  # tenths of a second
    for suffix in ("mp4", "mkv"):
        with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 10)
            for tick in ticks:
                frame = av.VideoFrame.from_ndarray(noise(seed=tick), format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        facts = probe_media(tmp_path / f"a.{suffix}")
        assert facts.times_s == pytest.approx([tick / 10 for tick in ticks], abs=1e-3), (
            "ticks of 1 ms in .mkv"
        )
        assert facts.num_frames == 4


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 18, reason="this PyAV cannot write a turned video")
@pytest.mark.parametrize(
    ("degrees", "size"), [(90, (64, 48)), (180, (48, 64)), (270, (64, 48)), (0, (48, 64))]
)
def test_a_turned_video_has_its_upright_size(degrees: int, size: tuple[int, int], tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(degrees)
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(smooth(), format="rgb24")))
        container.mux(stream.encode())
    facts = probe_media(file)
    assert (facts.height, facts.width) == size == diffsynth.VideoData(file).shape()
    assert facts.shown_size == ((128, 48) if degrees in (90, 270) else (48, 128))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("options", "aspect", "is_hdr", "is_interlaced"),
    [
        pytest.param("keyint=1", 1.0, False, False, id="plain"),
        pytest.param("sar=4/3", 4 / 3, False, False, id="wide"),
        pytest.param("sar=1/2", 0.5, False, False, id="narrow"),
        pytest.param("sar=1000/1001", 1.0, False, False, id="rounding"),
        pytest.param("sar=1/100", 1.0, False, False, id="nonsense"),
        pytest.param("transfer=smpte2084", 1.0, True, False, id="pq"),
        pytest.param("transfer=arib-std-b67", 1.0, True, False, id="hlg"),
        pytest.param("transfer=bt709", 1.0, False, False, id="sdr"),
        pytest.param("interlaced=1", 1.0, False, True, id="interlaced"),
    ],
)
def test_the_header_tells_what_pixels_mean(
    suffix: str, options: str, aspect: float, is_hdr: bool, is_interlaced: bool, tmp_path: Path
) -> None:
    facts = probe_media(write_odd(tmp_path / f"a{suffix}", options))
    assert facts.pixel_aspect == pytest.approx(aspect) and facts.is_anamorphic == (aspect != 1)
    assert (facts.is_hdr, facts.is_interlaced) == (is_hdr, is_interlaced)
    assert facts.shown_size == {4 / 3: (48, 85), 0.5: (96, 64)}.get(aspect, (48, 64))


def test_a_picture_is_one_upright_frame(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=exif)
    facts = probe_media(tmp_path / "a.jpg")
    assert (facts.height, facts.width, facts.num_frames, facts.fps) == (64, 48, 1, None)
    assert facts.is_picture


def test_a_video_that_is_cut_short_says_so(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w", options={"movflags": "faststart"}) as container:  # the index lies in front
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(seed=number), format="rgb24")))
        container.mux(stream.encode())
    whole = file.read_bytes()
    assert probe_media(file).num_frames == 9
    file.write_bytes(whole[:-100])
    with pytest.raises(MediaReadError, match="is cut short: its index tells of"):
        probe_media(file)


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_what_is_no_media_says_so(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    with pytest.raises(MediaNotFoundError, match="does not exist"):
        probe_media(file)
    file.touch()
    with pytest.raises(MediaReadError, match="is empty"):
        probe_media(file)
    file.write_bytes(bytes(np.arange(100, dtype=np.uint8)))
    with pytest.raises(MediaReadError, match=r"cannot be read as a picture|is not a video"):
        probe_media(file)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaReadError, match="has no picture track"):
        probe_media(file)


def test_a_tag_that_is_not_utf8_does_not_stop_anyone(tmp_path: Path) -> None:
    file = tmp_path / "a.mkv"
    with av.open(str(file), "w") as container:
        container.metadata["title"] = "XXXXXXXX"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(), format="rgb24")))
        container.mux(stream.encode())
    data = file.read_bytes()
    assert b"XXXXXXXX" in data
    file.write_bytes(data.replace(b"XXXXXXXX", bytes(range(0xF0, 0xF8))))
    assert probe_media(file).num_frames == len(diffsynth.VideoData(file)) == 1


def test_a_png_with_a_broken_chunk_is_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(noise()).save(file)
    data = file.read_bytes()
    at = data.index(b"IDAT")
    file.write_bytes(data[:at] + b"\x00\x01\x02\x03" + data[at + 4 :])
    with pytest.raises(MediaReadError, match="cannot be read as a picture"):
        diffsynth.video.load_image(file)

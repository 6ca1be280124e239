"""Reading: exact frames in any order, from any file."""

from __future__ import annotations

import pickle
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from diffsynth.errors import (
    ArgumentError,
    MediaNotFoundError,
    MediaReadError,
    UnknownArgumentError,
)
from diffsynth.video import (
    VideoData,
    save_video,
)
from tests.pictures import NUM_FRAMES, noise, number_of, numbered

FILES = [
    pytest.param("a.mp4", {"ffmpeg_params": ["-g", "7", "-bf", "3"]}, id="h264-with-b-frames"),
    pytest.param(
        "a.mkv", {"ffmpeg_params": ["-g", "7", "-x264-params", "open-gop=1"]}, id="h264-open-groups"
    ),
    pytest.param("a.mkv", {"codec": "libx265", "ffmpeg_params": ["-g", "7"]}, id="h265-open-groups"),
    pytest.param("a.webm", {"ffmpeg_params": ["-g", "7"]}, id="vp9-with-hidden-frames"),
    pytest.param("a.mov", {"codec": "prores_ks"}, id="prores-all-key-frames"),
    pytest.param("a.gif", {}, id="gif-seeks-from-the-start"),
]


@pytest.mark.parametrize(("name", "options"), FILES)
def test_any_order_of_access_gives_the_exact_frame(tmp_path: Path, name: str, options: dict) -> None:
    save_video(numbered(), tmp_path / name, fps=20, **options)
    video = VideoData(tmp_path / name)
    assert len(video) == NUM_FRAMES and video.fps == 20 and video.shape() == (48, 64)
    order = np.random.default_rng(0).permutation(NUM_FRAMES).tolist()
    assert [number_of(video[index]) for index in order] == order
    assert [number_of(image) for image in video] == list(range(NUM_FRAMES))
    assert [number_of(video[index]) for index in (5, 6, 9, 3, -1, -NUM_FRAMES)] == [5, 6, 9, 3, 30, 0]


@pytest.mark.parametrize("codec", ["mpeg4", "libvpx"])
def test_files_without_usable_time_stamps_are_counted_by_decoding(tmp_path: Path, codec: str) -> None:
    path = tmp_path / ("a.avi" if codec == "mpeg4" else "a.webm")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options={"bf": "2"} if codec == "mpeg4" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in numbered():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    video = VideoData(path)
    assert len(video) == NUM_FRAMES
    assert [number_of(video[index]) for index in (30, 0, 17, 18, 4)] == [30, 0, 17, 18, 4]


def test_slices_length_and_iteration_agree(tmp_path: Path) -> None:
    save_video(numbered(), tmp_path / "a.mp4")
    video = VideoData(tmp_path / "a.mp4", height=24, width=48)
    assert [number_of(image) for image in video[2:9:3]] == [2, 5, 8]
    video.set_length(10)
    assert len(video) == len(list(video)) == len(video.raw_data()) == 10
    assert number_of(video[-1]) == 9 and video[0].size == (48, 24) and video.shape() == (24, 48)
    with pytest.raises(IndexError, match="frame 10 of a video of 10 frames"):
        video[10]
    with pytest.raises(ArgumentError, match="the video has 31 frames"):
        video.set_length(32)


def test_a_reader_travels_to_another_process(tmp_path: Path) -> None:
    save_video(numbered(), tmp_path / "a.mp4")
    video = VideoData(tmp_path / "a.mp4")
    assert number_of(video[20]) == 20
    assert number_of(pickle.loads(pickle.dumps(video))[7]) == 7


def test_frames_are_cropped_in_the_middle_and_resized_as_in_v1(tmp_path: Path) -> None:
    picture = noise(50, 90)
    Image.fromarray(picture).save(tmp_path / "0.png")
    wide = VideoData(image_folder=tmp_path, height=40, width=40)[0]
    tall = VideoData(image_folder=tmp_path, height=20, width=80)[0]
    assert wide.tobytes() == Image.fromarray(picture[:, 20:70]).resize((40, 40)).tobytes()
    assert tall.tobytes() == Image.fromarray(picture[14:36]).resize((80, 20)).tobytes()


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 18, reason="this PyAV cannot write a turned video")
def test_a_turned_video_is_given_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:24] = 255  # white above in the stored picture
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)  # shown a quarter turn against the clock
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    shown = np.asarray(VideoData(path)[0])
    assert shown.shape == (64, 48, 3) and VideoData(path).shape() == (64, 48)
    assert shown[:, :12].min() > 200 and shown[:, -12:].max() < 50  # white is now on the left


def test_a_folder_is_read_in_natural_order_with_any_extension(tmp_path: Path) -> None:
    for name in ("10.PNG", "2.jpg", "1.webp", "3.JPEG", "20.bmp"):
        Image.new("L", (8, 8), int(name.split(".")[0]) * 10).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    video = VideoData(image_folder=tmp_path)
    assert [int(np.rint(np.asarray(image).mean() / 10)) for image in video] == [1, 2, 3, 10, 20]
    assert video.fps is None and video[0].mode == "RGB"
    assert len(VideoData(image_folder=tmp_path, file_list=["3.JPEG", "1.webp"])) == 2


def test_a_cut_file_gives_its_frames_and_then_says_so(tmp_path: Path) -> None:
    save_video((noise(seed=number) for number in range(40)), tmp_path / "a.mkv", ffmpeg_params=["-g", "10"])
    whole = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    video = VideoData(tmp_path / "cut.mkv")
    assert 10 < len(video) < 30
    assert video[5].tobytes() == VideoData(tmp_path / "a.mkv")[5].tobytes()
    (tmp_path / "noise.mp4").write_bytes(noise().tobytes())
    with pytest.raises(MediaReadError, match=r"noise\.mp4 is not a video"):
        VideoData(tmp_path / "noise.mp4")
    (tmp_path / "0.png").write_bytes(b"none")
    with pytest.raises(MediaReadError, match="cannot be read as a picture"):
        VideoData(image_folder=tmp_path)[0]


def test_wrong_sources_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="one source"):
        VideoData()
    with pytest.raises(MediaNotFoundError, match="does not exist"):
        VideoData(tmp_path / "none.mp4")
    with pytest.raises(MediaNotFoundError, match="holds no picture"):
        VideoData(image_folder=tmp_path)
    with pytest.raises(UnknownArgumentError, match="Did you mean 'height'"):
        VideoData(tmp_path / "none.mp4", heightt=3)
    with pytest.raises(ArgumentError, match="give both"):
        VideoData(tmp_path / "none.mp4", height=3)

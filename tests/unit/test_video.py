"""Videos in and out: exact frames, nothing half-written, pictures equal to what was given."""

from __future__ import annotations

import errno
import os
import pickle
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
    MediaReadError,
    NotFiniteError,
    OutputPathError,
    UnknownArgumentError,
)
from diffsynth.video import (
    VideoData,
    VideoWriter,
    check_output_path,
    frames_to_tensor,
    read_metadata,
    save_frames,
    save_image,
    save_video,
    tensor_to_frames,
    to_pil,
)
from diffsynth.video.encoding import choose_encoding

NUM_FRAMES = 31


def numbered_frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that tells its number: five grey bars, one per bit."""
    bits = [number >> bit & 1 for bit in range(5)]
    return (
        np.repeat(np.kron(bits, np.ones((height, width // 5 + 1)))[:, :width, None], 3, axis=2).astype("u1")
        * 255
    )


def number_of(image: Image.Image) -> int:
    row = np.asarray(image.convert("L"))[image.height // 2]
    bar = len(row) // 5 + 1
    return sum(int(row[min(bar * bit + bar // 2, len(row) - 1)] > 127) << bit for bit in range(5))


def numbered(count: int = NUM_FRAMES) -> Iterator[np.ndarray]:
    return (numbered_frame(number) for number in range(count))


def noise(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 255 * (1 - x)], axis=2).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ reading

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
        VideoData(tmp_path / "none.mp4", heigth=3)
    with pytest.raises(ArgumentError, match="give both"):
        VideoData(tmp_path / "none.mp4", height=3)


# ------------------------------------------------------------------------------------------------ writing


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
# 4:2:0 averages colour over 2x2 pixels, which a smooth picture hardly feels.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"crf": 0, "pix_fmt": "yuv444p"}, 2, id="full-colour"),
        pytest.param({"crf": 0}, 6, id="shared-colour"),
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


# ------------------------------------------------------------------------------------------------ failures

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
    pytest.param([None], "a NoneType", id="nothing"),
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
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
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


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG"])
def test_pictures_keep_their_settings(tmp_path: Path, name: str) -> None:
    save_image(smooth(), tmp_path / name, metadata={"prompt": "圆", "seed": 3})
    assert read_metadata(tmp_path / name) == {"prompt": "圆", "seed": 3}


def test_numbered_pictures_are_lossless_and_read_back(tmp_path: Path) -> None:
    save_frames(torch.from_numpy(np.stack([noise(seed=s) for s in range(12)])), tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new"), key=lambda name: int(name[:-4]))[-1] == "11.png"
    video = VideoData(image_folder=tmp_path / "new")
    assert np.array_equal(np.asarray(video[11]), noise(seed=11))
    video.save_images(tmp_path / "copy")
    assert len(os.listdir(tmp_path / "copy")) == 12
    with pytest.raises(OutputPathError, match="is a file"):
        save_frames([noise()], tmp_path / "copy" / "0.png")
    with pytest.raises(ArgumentError, match=r"save as \.png"):
        save_image(noise(), tmp_path / "a.webp", metadata={"seed": 1})


# ------------------------------------------------------------------------------------------------ tensors


def test_eight_bits_go_to_the_network_and_back_unchanged() -> None:
    pictures = [Image.fromarray(noise(seed=seed)) for seed in range(5)]
    tensor = frames_to_tensor(pictures, 48, 64)
    assert tensor.shape == (1, 3, 5, 48, 64) and tensor.dtype == torch.float32
    expected = torch.from_numpy(noise(seed=4)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(tensor[0, :, 4], expected)
    assert np.array_equal(tensor_to_frames(tensor)[0, 4], noise(seed=4))
    assert [image.tobytes() for image in to_pil(tensor_to_frames(tensor)[0])] == [
        p.tobytes() for p in pictures
    ]


def test_real_numbers_are_not_rounded_to_eight_bits() -> None:
    unit = torch.rand(4, 3, 8, 12)
    for frames in (unit, unit.numpy(), list(unit), unit.double()):
        assert torch.equal(frames_to_tensor(frames, 8, 12), (unit * 2 - 1).permute(1, 0, 2, 3)[None])
    assert frames_to_tensor(unit[0], 8, 12).shape == (1, 3, 1, 8, 12)


@pytest.mark.parametrize("grey", [torch.rand(1, 8, 12), np.random.rand(8, 12), np.eye(8, 12, dtype=bool)])
def test_a_grey_mask_has_three_equal_channels(grey: object) -> None:
    tensor = frames_to_tensor([grey], 8, 12)
    assert torch.equal(tensor[:, 0], tensor[:, 2]) and torch.equal(tensor[:, 0], tensor[:, 1])


def test_frames_of_another_size_are_fitted_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_frames([smooth(50, 90)], tmp_path)
    with caplog.at_level("INFO", logger="diffsynth"):
        tensor = frames_to_tensor(VideoData(image_folder=tmp_path), 40, 40)
    assert "frames of 90x50 were cropped in the middle and resized to 40x40" in caplog.text
    same = VideoData(image_folder=tmp_path, height=40, width=40)
    assert torch.equal(tensor, frames_to_tensor(same, 40, 40))
    unit = torch.from_numpy(smooth(50, 90)).permute(2, 0, 1) / 255
    # PIL rounds to 8 bits after each of its two passes, torch does not: up to one level apart
    assert (frames_to_tensor(unit, 40, 40) - tensor).abs().max() <= 2 / 255


def test_rounding_is_nearest_and_truncation_is_asked_for() -> None:
    levels = torch.tensor([-1.5, -1.0, 0.3 / 127.5 - 1, 0.7 / 127.5 - 1, 254.6 / 127.5 - 1, 1.0, 1.5])
    video = levels.view(1, 1, 1, 1, 7).expand(1, 3, 1, 1, 7)
    assert tensor_to_frames(video)[0, 0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert tensor_to_frames(video, rounding="truncate")[0, 0, 0, :, 0].tolist() == [0, 0, 0, 0, 254, 255, 255]
    assert tensor_to_frames(video.bfloat16()).shape == (1, 1, 1, 7, 3)
    with pytest.raises(NotFiniteError, match="float32"):
        tensor_to_frames(video * float("nan"))
    with pytest.raises(ArgumentError, match=r"give \(B, 3, F, H, W\)"):
        tensor_to_frames(video[0])
    with pytest.raises(ArgumentError, match="rounding"):
        tensor_to_frames(video, rounding="up")  # type: ignore[arg-type]


def test_importing_and_writing_ask_for_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, diffsynth.video as v\n"
        "assert 'torch' not in sys.modules and 'av' not in sys.modules\n"
        "v.save_video([numpy.zeros((8, 8, 3), 'u1')], sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


def test_a_picture_that_cannot_be_read_is_not_called_a_full_disk(tmp_path: Path) -> None:
    save_image(noise(), tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(OSError, match="truncated") as caught:
        save_video([image], tmp_path / "a.mp4")
    assert not isinstance(caught.value, OutputPathError)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "cut.png"]

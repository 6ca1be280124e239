"""Frames out of video files and folders of pictures, on request and exact to the frame."""

from __future__ import annotations

import logging
import operator
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffsynth.errors import ArgumentError, MediaNotFoundError, MediaReadError, UnknownArgumentError, absence
from diffsynth.video.encoding import scaling
from diffsynth.video.ffmpeg import pyav
from diffsynth.video.images import save_frames
from diffsynth.video.pixels import cover
from diffsynth.video.plain import plain_picture

if TYPE_CHECKING:
    from av import VideoFrame

logger = logging.getLogger("diffsynth")

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class FrameSource(Protocol):
    """What VideoData reads from."""

    fps: float | None  # frames per second; None for a folder of pictures
    files: Sequence[Path]  # that frames are read from

    def __len__(self) -> int: ...
    def frame(self, index: int) -> Image.Image:
        """Return frame ``index``, 0 <= index < len, in RGB."""


class VideoData:
    """A video on disk as a sequence of PIL pictures (RGB); a frame is decoded when it is asked for.

    With ``height`` and ``width``, each frame is cropped in the middle to that shape, then resized (bicubic).

    Args:
        video_file: any file that ffmpeg reads.
        image_folder: instead: a folder of pictures, in natural order (2.png before 10.png).
        height: of the frames given out, in pixels; together with ``width``, or neither.
        width: as ``height``.
        kwargs: ``file_list``: names of the pictures in ``image_folder``, in the order wanted.

    Raises:
        ArgumentError: when both or none of ``video_file`` and ``image_folder`` are given, or only one size.
        UnknownArgumentError: for any other keyword.
        MediaNotFoundError: when the file does not exist, or the folder holds no picture.
        MediaReadError: when the file cannot be decoded.
    """

    def __init__(
        self,
        video_file: str | os.PathLike[str] | None = None,
        image_folder: str | os.PathLike[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **kwargs: Sequence[str] | None,
    ) -> None:
        if (video_file is None) == (image_folder is None):
            raise ArgumentError("VideoData needs one source: video_file=FILE or image_folder=FOLDER.")
        for name in kwargs:
            if name != "file_list" or video_file is not None:
                known = ["video_file", "image_folder", "height", "width", "file_list"]
                raise UnknownArgumentError(
                    name, known, "VideoData(video_file=...)" if video_file else "VideoData()"
                )
        self.height: int | None = None
        self.width: int | None = None
        if height is not None or width is not None:
            self.set_shape(height, width)
        self.data: FrameSource
        if video_file is not None:
            self.data = VideoFile(video_file)
        else:
            self.data = ImageFolder(image_folder, **kwargs)  # type: ignore[arg-type]
        self.length: int | None = None

    @property
    def fps(self) -> float | None:
        """Frames per second (the average, where it varies); None for a folder of pictures."""
        return self.data.fps

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file of the video, or of each picture."""
        return tuple(self.data.files)

    def __len__(self) -> int:
        return len(self.data) if self.length is None else self.length

    @overload
    def __getitem__(self, item: int) -> Image.Image: ...
    @overload
    def __getitem__(self, item: slice) -> list[Image.Image]: ...
    def __getitem__(self, item: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(item, slice):
            return [self[index] for index in range(*item.indices(len(self)))]
        index = operator.index(item)
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"frame {index} of a video of {len(self)} frames; give {-len(self)} to {len(self) - 1}."
            )
        image = self.data.frame(index % len(self))
        return image if self.height is None or self.width is None else cover(image, self.height, self.width)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    def raw_data(self) -> list[Image.Image]:
        """Return all frames as a list."""
        return list(self)

    def set_length(self, length: int) -> None:
        """Use the first ``length`` frames only.

        Raises:
            ArgumentError: when the video has fewer.
        """
        if not 1 <= length <= len(self.data):
            raise ArgumentError(
                f"length is {length}, the video has {len(self.data)} frames; give 1 to as many."
            )
        self.length = length

    def set_shape(self, height: int | None, width: int | None) -> None:
        """Give out frames of this size, in pixels.

        Raises:
            ArgumentError: when one of them is missing or below 1.
        """
        if height is None or width is None or height < 1 or width < 1:
            raise ArgumentError(f"height is {height} and width is {width}; give both, or neither, from 1 up.")
        self.height, self.width = height, width

    def shape(self) -> tuple[int, int]:
        """Height and width of the frames given out, in pixels."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        first = self.data.frame(0)
        return first.height, first.width

    def save_images(self, folder: str | os.PathLike[str]) -> None:
        """Write every frame as ``0.png``, ``1.png`` ... into ``folder``."""
        save_frames(self, folder)


class ImageFolder:
    """The pictures of one folder in natural order; extensions in any case."""

    fps: float | None = None

    def __init__(self, folder: str | os.PathLike[str], file_list: Sequence[str] | None = None) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise MediaNotFoundError(f"{folder} is no folder; give the folder that holds the pictures.")
        names = file_list
        if names is None:
            found = (entry.name for entry in root.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES)
            names = sorted((name for name in found if not name.startswith(".")), key=natural_key)
        self.files: Sequence[Path] = [root / name for name in names]
        self._said: set[str] = set()  # what the log was told of them
        missing = [str(file) for file in self.files if not file.is_file()]
        if missing or not self.files:
            what = f"lacks {', '.join(missing[:3])}" if missing else "holds no picture"
            raise MediaNotFoundError(f"{folder} {what}; pictures end in {', '.join(PICTURE_SUFFIXES)}.")

    def __len__(self) -> int:
        return len(self.files)

    def frame(self, index: int) -> Image.Image:
        try:
            with Image.open(self.files[index]) as image:
                pixels, changes = plain_picture(image)
        except (UnidentifiedImageError, OSError) as error:
            raise MediaReadError(f"{self.files[index]} cannot be read as a picture: {error}.") from error
        if not self._said.issuperset(changes):
            self._said.update(changes)
            logger.info("pictures of %s were %s", self.files[index].parent, "; ".join(changes))
        return Image.fromarray(pixels)


class VideoFile:
    """Random access to the frames of one video file.

    The packets are listed once, without decoding; a frame is then found by its own time stamp: from the last
    key frame before it, or onwards from the frame before. Files whose packets have no usable time stamps
    (some .avi, raw streams) are decoded once to count them, and are read from the front. Turned videos
    (phones) are turned upright.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MediaNotFoundError(f"{path} {absence(path)}; give the path of a video file.")
        self.files: Sequence[Path] = [self.path]
        self._open()
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps: float | None = float(rate) if rate else None
        self._times, self._keys = self._list_packets()
        self._length = len(self._times) if self._times else self._count_frames()
        if not self._length:
            raise MediaReadError(f"{path} holds no frame that can be decoded.")

    def __len__(self) -> int:
        return self._length

    @property
    def times_s(self) -> tuple[float, ...]:
        """When each frame is shown, in seconds; empty where the file does not tell."""
        tick_s = float(self._stream.time_base or 0)
        return tuple(tick_s * time for time in self._times)

    def __getstate__(self) -> dict[str, Any]:  # open files do not travel to worker processes
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("_stream", "_container", "_frames")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def frame(self, index: int) -> Image.Image:
        import av

        try:
            found = self._by_time(index) if self._times else self._by_count(index)
        except av.FFmpegError as error:
            raise MediaReadError(f"{self.path}: frame {index} cannot be decoded: {error}.") from error
        if found is None:
            raise MediaReadError(
                f"{self.path}: frame {index} of {self._length} cannot be decoded; the file is damaged or cut "
                "short. Use the frames before it with set_length(N), or make the file anew."
            )
        self._next = index + 1
        return _to_image(found)

    def _open(self) -> None:
        av = pyav()
        try:
            self._container = av.open(str(self.path), metadata_errors="replace")
        except av.FFmpegError as error:
            raise MediaReadError(f"{self.path} is not a video that can be read: {error}.") from error
        stream = self._container.streams.best("video")
        if stream is None:
            raise MediaReadError(f"{self.path} has no picture track.")
        self._stream: Any = stream
        codec: Any = stream.codec_context
        codec.thread_type = "AUTO"
        self._frames: Iterator[VideoFrame] = self._decode()
        self._next = 0  # number of the frame that decoding would give next

    def _decode(self) -> Iterator[VideoFrame]:
        frames: Iterator[VideoFrame] = self._container.decode(self._stream)
        return frames

    def _list_packets(self) -> tuple[list[int], list[int]]:
        """Time stamps in order of showing, and which are key frames; nothing when they are of no use."""
        import av

        packets = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.size and not packet.is_discard:
                    packets.append((packet.pts, packet.is_keyframe))
        except av.FFmpegError:
            pass  # a file that is cut short: what can be read of it counts
        self._open()
        times = sorted(pts for pts, _ in packets if pts is not None)
        has_hidden_frames = self._stream.codec_context.name == "vp8"
        if len(times) < len(packets) or len(set(times)) < len(times) or has_hidden_frames:
            return [], []
        keys = {pts for pts, is_key in packets if is_key}
        return times, [index for index, pts in enumerate(times) if pts in keys]

    def _count_frames(self) -> int:
        import av

        count = 0
        try:
            for _ in self._frames:
                count += 1
        except av.FFmpegError:
            pass  # as above
        self._open()
        return count

    def _by_count(self, index: int) -> VideoFrame | None:
        if index < self._next:
            self._open()
        for number, frame in enumerate(self._frames, start=self._next):
            if number == index:
                return frame
        self._open()
        return None

    def _by_time(self, index: int) -> VideoFrame | None:
        """The frame with the time stamp of ``index``; from ever earlier key frames until one leads to it."""
        wanted = self._times[index]
        before = bisect_right(self._keys, index)
        if (self._keys[before - 1] if before else 0) <= self._next <= index:
            found = self._decode_until(wanted)
            if found is not None:
                return found
        for key in (*reversed(self._keys[:before]), 0):
            self._container.seek(self._times[key], stream=self._stream)
            self._frames = self._decode()
            found = self._decode_until(wanted)
            if found is not None:
                return found
        self._open()
        return None

    def _decode_until(self, wanted: int) -> VideoFrame | None:
        for frame in self._frames:
            if frame.pts is not None and frame.pts >= wanted:
                return frame if frame.pts == wanted else None
        return None


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts 2.png before 10.png, whatever the case of the letters."""
    parts = re.split(r"(\d+)", name.lower())
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _to_image(frame: VideoFrame) -> Image.Image:
    flags = scaling("BICUBIC", "ACCURATE_RND", "FULL_CHR_H_INT")
    pixels = frame.reformat(format="rgb24", interpolation=flags).to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)

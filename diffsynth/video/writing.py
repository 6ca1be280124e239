"""Videos into files, one frame at a time; the file appears when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsynth.errors import ArgumentError, OutputPathError
from diffsynth.video.encoding import choose_encoding, frame_rate, scaling
from diffsynth.video.paths import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    check_output_path,
    disk_errors,
    publish,
    remove_leftovers,
    temporary_beside,
)
from diffsynth.video.pixels import Frame, Frames, as_rgb8, iterate_frames
from diffsynth.video.settings import TAG, insert_gif_comment, pack


class VideoWriter:
    """Writes frames into a video as they come; memory does not grow with their number.

    ::

        with VideoWriter("cat.mp4", fps=16) as writer:
            for frame in frames:
                writer.write(frame)

    Leaving the block completes the file under its name; leaving it by an exception removes what was written.
    Path, codec and options are checked when the writer is made, before the first frame.

    Args:
        save_path: ends in .mp4, .m4v, .mov, .mkv, .webm or .gif; a missing folder is created.
        fps: frames per second; Wan models are trained at 16 (TI2V-5B: 24).
        quality: 1 (smallest file) to 10 (best), as in v1; 9 when neither this nor ``crf`` is given.
        ffmpeg_params: options of the encoder in ffmpeg's form, such as ["-preset", "slow"].
        crf: the codec's own measure instead of ``quality``: 0 best, 51 worst for H.264.
        codec: ffmpeg's name of an encoder; default libx264, for .webm libvpx-vp9.
        pix_fmt: ffmpeg's name; default yuv420p. "yuv444p" keeps full colour and takes odd sizes.
        metadata: settings to keep inside the file, for `read_metadata`.

    Raises:
        OutputPathError: when ``save_path`` cannot be written.
        ArgumentError: when an option cannot work on this machine, or contradicts another.
    """

    def __init__(
        self,
        save_path: str | os.PathLike[str],
        fps: float | Fraction = 16,
        quality: float | None = None,
        ffmpeg_params: Sequence[str] | None = None,
        *,
        crf: float | None = None,
        codec: str | None = None,
        pix_fmt: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        suffix = os.path.splitext(os.fspath(save_path))[1].lower()
        if suffix in IMAGE_SUFFIXES:
            raise OutputPathError(
                f"{save_path} names a picture, not a video; save_frames(frames, FOLDER) writes numbered "
                f"pictures, save_image one of them, and a video ends in {', '.join(VIDEO_SUFFIXES)}."
            )
        self.path = check_output_path(save_path, suffixes=VIDEO_SUFFIXES)
        remove_leftovers(self.path.parent, pause_s=10.0)  # thousands of clips may go into one folder
        self.num_frames = 0  # written so far
        self.overwrites = True  # False: a file of this name stays, and `path` becomes the next number
        self._rate = frame_rate(fps)
        self._encoding = choose_encoding(
            self.path.suffix.lower(),
            quality=quality,
            crf=crf,
            codec=codec,
            pix_fmt=pix_fmt,
            ffmpeg_params=ffmpeg_params,
        )
        self._comment = None if metadata is None else pack(metadata)
        self._temporary = temporary_beside(self.path)
        self._size: tuple[int, int] | None = None  # height, width of the first frame
        self._container: Any = None
        self._stream: Any = None
        self._is_done = False

    def write(self, frame: Frame) -> None:
        """Add one frame: PIL, uint8 (H, W, 3), or real (3, H, W) in [0, 1].

        Raises:
            ArgumentError: when it has another size than the first, or a wrong shape, type or range.
            OutputPathError: when the disk is full or fails.
        """
        if self._is_done:
            raise ArgumentError(f"{self.path} is already closed; make a new VideoWriter.")
        with self._removed_on_failure():
            pixels = as_rgb8(frame, self.num_frames)  # outside: a picture that cannot be read is no full disk
        with self._removed_on_failure(), disk_errors(self.path, f" after {self.num_frames} frames"):
            height, width = pixels.shape[:2]
            if self._size is None:
                self._open(height, width)
            elif self._size != (height, width):
                raise ArgumentError(
                    f"frame {self.num_frames} is {width}x{height}, "
                    f"the first was {self._size[1]}x{self._size[0]}; all frames of a video have one size."
                )
            picture = self._to_picture(pixels)
            picture.pts = self.num_frames
            self._container.mux(self._stream.encode(picture))
            self.num_frames += 1

    def close(self) -> None:
        """Complete the file and give it its name. A second call does nothing.

        Raises:
            ArgumentError: when no frame was written.
            OutputPathError: when the disk is full or fails.
        """
        if self._is_done:
            return
        with self._removed_on_failure(), disk_errors(self.path, f" after {self.num_frames} frames"):
            self._complete()
            self.path = publish(self._temporary, self.path, overwrite=self.overwrites)
        self._is_done = True

    def rehearse(self, height: int, width: int) -> None:
        """Write one black frame of this size in pixels, and remove it: tells at once what would fail later.

        Raises:
            ArgumentError, OutputPathError: as `write` and `close`.
        """
        self.write(np.zeros((height, width, 3), dtype=np.uint8))
        with self._removed_on_failure(), disk_errors(self.path):
            self._complete()
        self.abort()

    def abort(self) -> None:
        """Stop, and remove what was written. A file that had the name before stays as it was."""
        self._is_done = True
        if self._container is not None:
            with contextlib.suppress(OSError, ValueError):  # it cannot be completed; that is no news
                self._container.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._is_done:
            self.abort()

    @contextlib.contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        import av

        try:
            yield
        except av.FFmpegError as error:
            self.abort()
            raise ArgumentError(
                f"codec {self._encoding.codec} refused frame {self.num_frames} of {self.path}: {error}. "
                "Try another codec or size."
            ) from error
        except BaseException:
            self.abort()
            raise

    def _complete(self) -> None:
        if self._container is None:
            raise ArgumentError(f"no frame was given for {self.path}; a video needs one or more.")
        self._container.mux(self._stream.encode())
        self._container.close()
        if self._comment is not None and self._encoding.container == "gif":
            insert_gif_comment(self._temporary, self._comment)

    def _open(self, height: int, width: int) -> None:
        import av

        encoding = self._encoding
        encoding.check_size(width, height)
        self._size = (height, width)
        self._container = av.open(
            str(self._temporary), "w", format=encoding.container, options=dict(encoding.container_options)
        )
        if self._comment is not None and encoding.container != "gif":
            self._container.metadata[TAG] = self._comment
        self._stream = self._container.add_stream(
            encoding.codec, rate=self._rate, options=dict(encoding.options)
        )
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = encoding.pix_fmt
        context = self._stream.codec_context
        context.bit_rate = 0  # quality alone decides, unless the options name a rate
        if encoding.codec == "libx265" and encoding.container in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # Apple's players ignore ffmpeg's own hev1
        if encoding.pix_fmt.startswith("yuv"):
            # BT.601 numbers with a tag that says so: readers that know tags and those that assume agree.
            context.colorspace = 6  # SMPTE 170M, the matrix of BT.601
            context.color_range = 1  # 16 to 235
            context.color_primaries = 1  # BT.709, those of sRGB
            context.color_trc = 1  # BT.709

    def _to_picture(self, pixels: NDArray[np.uint8]) -> Any:
        import av
        from av.video.reformatter import ColorRange, Colorspace

        if self._encoding.pix_fmt == "pal8":
            image = Image.fromarray(pixels).quantize(256)  # the best 256 colours of this frame
            palette = np.full((256, 4), 255, dtype=np.uint8)
            colours = np.asarray(image.getpalette(), dtype=np.uint8).reshape(-1, 3)
            palette[: len(colours), 1:] = colours  # alpha, red, green, blue
            return av.VideoFrame.from_ndarray((np.asarray(image), palette), format="pal8")  # type: ignore[arg-type]
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        return frame.reformat(
            format=self._encoding.pix_fmt,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            interpolation=scaling("BICUBIC", "ACCURATE_RND", "FULL_CHR_H_INP"),
        )


def save_video(  # noqa: PLR0913 - as VideoWriter
    frames: Frames,
    save_path: str | os.PathLike[str],
    fps: float | Fraction = 16,
    quality: float | None = None,
    ffmpeg_params: Sequence[str] | None = None,
    *,
    crf: float | None = None,
    codec: str | None = None,
    pix_fmt: str | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a video; frames are taken one by one, so a generator may make them while they are written.

    A size is never changed: what the format cannot hold is an error.

    Args:
        frames: PIL pictures, uint8 arrays (H, W, 3) or real ones (3, H, W) in [0, 1], in any iterable; or one
            tensor or array (F, 3, H, W) or (F, H, W, 3).
        save_path: as the other arguments, see `VideoWriter`.
        fps: frames per second.
        quality: 1 to 10; default 9.
        ffmpeg_params: options of the encoder in ffmpeg's form.
        crf: instead of ``quality``.
        codec: default by the extension.
        pix_fmt: default yuv420p.
        metadata: settings to keep inside the file.

    Raises:
        OutputPathError: when the path cannot be written or the disk is full; nothing half-written stays.
        ArgumentError: for a frame or an option that cannot work.
    """
    with VideoWriter(
        save_path,
        fps,
        quality,
        ffmpeg_params,
        crf=crf,
        codec=codec,
        pix_fmt=pix_fmt,
        metadata=metadata,
    ) as writer:
        for frame in iterate_frames(frames):
            writer.write(frame)

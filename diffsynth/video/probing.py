"""What the header of a picture or video tells: size, number of frames, rate; nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from diffsynth.errors import MediaNotFoundError, MediaReadError, absence
from diffsynth.video.ffmpeg import pyav
from diffsynth.video.images import UNREADABLE_PICTURE
from diffsynth.video.pixels import picture_size
from diffsynth.video.reading import PICTURE_SUFFIXES, VideoFile

_TKHD_MATRIX = {0: 40, 1: 52}  # version of the box -> bytes before its matrix; ISO/IEC 14496-12, 8.3.2
_MATRIX_BYTES = 36
_SQUARE, _WIDEST = 0.01, 8.0  # shares: of rounding, and of what is taken for damage
# AVColorTransferCharacteristic: SMPTE ST 2084 (PQ), ARIB STD-B67 (HLG); AVFieldOrder: above it are fields
_HDR_TRANSFERS, _PROGRESSIVE = (16, 18), 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFacts:
    """A picture or video, by its header."""

    height: int  # pixels, upright
    width: int
    num_frames: int  # 1 of a picture
    fps: float | None  # the average; None of a picture, or where the file does not tell
    times_s: tuple[float, ...] | None  # when each frame is shown, from 0; None: evenly, at ``fps``
    is_picture: bool
    pixel_aspect: float = 1.0  # width of a pixel over its height, upright; 1 is square
    is_hdr: bool = False  # its levels are of PQ or HLG
    is_interlaced: bool = False

    @property
    def is_anamorphic(self) -> bool:
        """Whether its pixels are not square."""
        return self.pixel_aspect != 1

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width in square pixels, as players show it; no edge is made smaller."""
        aspect = self.pixel_aspect
        return round(self.height / min(aspect, 1.0)), round(self.width * max(aspect, 1.0))


def probe_media(path: str | os.PathLike[str]) -> MediaFacts:
    """Look at the header of a picture (by its extension) or of any file that ffmpeg reads.

    An .mp4 or .mov tells all in its index. Other containers are read through, packet by packet, without
    decoding; those whose packets have no time stamps are decoded to count their frames.

    Raises:
        MediaNotFoundError: when there is no such file.
        MediaReadError: when it is empty, cut short, or no picture or video.
    """
    file = Path(path)
    try:
        num_bytes = file.stat().st_size
    except OSError:
        raise MediaNotFoundError(f"{path} {absence(path)}; give the path of a picture or video.") from None
    if not file.is_file():
        raise MediaReadError(f"{path} is no file; give a picture or video.")
    if not num_bytes:
        raise MediaReadError(f"{path} is empty; copy it again.")
    return _probe_picture(file) if file.suffix.lower() in PICTURE_SUFFIXES else _probe_video(file, num_bytes)


def _probe_picture(file: Path) -> MediaFacts:
    try:
        with Image.open(file) as image:
            # Asking a PNG for EXIF that does not stand in front of its pixels would decode it.
            is_plain = image.format == "PNG" and "exif" not in image.info
            height, width = (image.height, image.width) if is_plain else picture_size(image)
    except UNREADABLE_PICTURE as error:
        raise MediaReadError(f"{file} cannot be read as a picture: {error}.") from error
    return MediaFacts(height=height, width=width, num_frames=1, fps=None, times_s=None, is_picture=True)


def _probe_video(file: Path, num_bytes: int) -> MediaFacts:
    av = pyav()
    try:
        with av.open(str(file), metadata_errors="replace") as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                raise MediaReadError(f"{file} has no picture track.")
            height, width = stream.height, stream.width
            rate = stream.average_rate or stream.guessed_rate
            tick_s = float(stream.time_base or 0)
            # Copied while the file is open: entries lie in its memory, and PyAV does not hold it for them.
            entries = [
                (entry.timestamp, entry.pos + entry.size, entry.is_discard)
                for entry in (stream.index_entries if stream.frames else ())
            ]
            is_indexed = bool(entries) and len(entries) == stream.frames
            has_boxes = "mp4" in container.format.name
            pixel_aspect, context = _pixel_aspect(stream), stream.codec_context
            is_hdr = context.color_trc in _HDR_TRANSFERS
            is_interlaced = _is_interlaced(container, stream)
    except av.FFmpegError as error:
        raise MediaReadError(f"{file} is not a video that can be read: {error.strerror}.") from error
    if not height or not width:
        raise MediaReadError(f"{file} does not tell the size of its picture; the file is damaged.")
    if is_indexed:
        told = max(end for _, end, _ in entries)
        if told > num_bytes:
            raise MediaReadError(
                f"{file} is cut short: its index tells of {told} bytes and {num_bytes} are there."
            )
        # Times of decoding: those of showing, shifted by a constant; a coder hands out the same instants.
        times_s = [tick_s * timestamp for timestamp, _, is_discard in entries if not is_discard]
        num_frames = len(times_s)
    else:
        video = VideoFile(file)
        times_s, num_frames = list(video.times_s), len(video)
    if not num_frames:
        raise MediaReadError(f"{file} holds no frame.")
    if has_boxes and _is_quarter_turned(file):
        height, width, pixel_aspect = width, height, 1 / pixel_aspect
    fps, uneven = _rate_of(times_s, float(rate) if rate else None)
    return MediaFacts(
        height=height, width=width, num_frames=num_frames, fps=fps, times_s=uneven, is_picture=False,
        pixel_aspect=pixel_aspect, is_hdr=is_hdr, is_interlaced=is_interlaced,
    )  # fmt: skip


def _pixel_aspect(stream: Any) -> float:
    """Width of a stored pixel over its height; 1 where the file does not tell, or tells nonsense."""
    told = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    is_square = abs(told - 1) < _SQUARE or not 1 / _WIDEST <= told <= _WIDEST
    return 1.0 if is_square else told


def _is_interlaced(container: Any, stream: Any) -> bool:
    order = getattr(stream.codec_context, "field_order", None)
    if order is not None:
        return int(order) > _PROGRESSIVE
    # Of an older PyAV the frames tell alone.
    frame = next(container.decode(stream), None)
    return frame is not None and bool(frame.interlaced_frame)


def _rate_of(times_s: Sequence[float], told: float | None) -> tuple[float | None, tuple[float, ...] | None]:
    """Frames per second, and the times where frames are not shown evenly (by more than half a frame)."""
    if len(times_s) < 2 or times_s[-1] <= times_s[0]:
        return told, None
    from_zero = tuple(time - times_s[0] for time in times_s)
    mean = (len(times_s) - 1) / from_zero[-1]
    for fps in (told, mean):
        if fps and max(abs(time * fps - number) for number, time in enumerate(from_zero)) <= 0.5:
            return fps, None
    return mean, from_zero


def _is_quarter_turned(file: Path) -> bool:
    """Whether a phone's video is shown turned by 90 or 270 degrees; PyAV tells it only of decoded frames."""
    with file.open("rb") as opened:
        end = opened.seek(0, os.SEEK_END)
        for start, stop in _boxes(opened, ((0, end),), (b"moov", b"trak", b"tkhd")):
            opened.seek(start)
            body = opened.read(min(stop - start, 128))
            at = _TKHD_MATRIX.get(body[0] if body else -1, 0)
            if not at or len(body) < at + _MATRIX_BYTES + 8:
                continue
            across, down = body[at : at + 4], body[at + 4 : at + 8]
            has_picture = any(body[at + _MATRIX_BYTES : at + _MATRIX_BYTES + 8])
            if has_picture:
                return not any(across) and any(down)
    return False


def _boxes(
    opened: BinaryIO, places: Sequence[tuple[int, int]], kinds: Sequence[bytes]
) -> Iterator[tuple[int, int]]:
    """Bodies (first byte, byte behind) of the boxes that lie along ``kinds``, one inside of the other."""
    for start, end in places:
        at = start
        while at + 8 <= end:
            opened.seek(at)
            head = opened.read(16)
            size, header = int.from_bytes(head[:4], "big"), 8
            if size == 1:
                size, header = int.from_bytes(head[8:16], "big"), 16
            elif size == 0:
                size = end - at
            if size < header:
                return
            body = (at + header, min(at + size, end))
            if head[4:8] == kinds[0]:
                yield from _boxes(opened, (body,), kinds[1:]) if len(kinds) > 1 else (body,)
            at += size

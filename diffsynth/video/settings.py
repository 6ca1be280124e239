"""The settings of a generation, kept inside the file that it made.

One JSON object in the tag ``comment``: players show it, and every container here has that tag.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from diffsynth.errors import ArgumentError, MediaNotFoundError, MediaReadError, absence
from diffsynth.video.ffmpeg import pyav
from diffsynth.video.paths import IMAGE_SUFFIXES

TAG = "comment"
MAX_LENGTH = 4 << 20  # of settings that are read; ours have a thousandth of that


def pack(metadata: Mapping[str, object]) -> str:
    """Return the settings as JSON that UTF-8 holds; a value that JSON does not know is written as its text.

    Raises:
        ArgumentError: when ``metadata`` is no mapping from names to values.
    """
    if not isinstance(metadata, Mapping) or not all(isinstance(name, str) for name in metadata):
        raise ArgumentError(f"metadata is {metadata!r}; give a mapping from names to values.")
    text = json.dumps(dict(metadata), ensure_ascii=False, default=str)
    # Names of files are bytes, which need not be UTF-8; escapes keep them as they are.
    return text if is_utf8(text) else json.dumps(dict(metadata), default=str)


def check_text(name: str, value: object) -> None:
    """Make sure that a text, or each text of a list, can be read by a model and written into a file.

    Raises:
        ArgumentError: for bytes that are not UTF-8.
    """
    for text in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []:
        if isinstance(text, str) and not is_utf8(text):
            shown = text.encode(errors="backslashreplace").decode()
            raise ArgumentError(
                f"{name} is not UTF-8: '{shown[:200]}'. Write it in UTF-8; of a text in Latin-1, "
                "iconv -f latin1 -t utf-8 FILE makes one."
            )


def is_utf8(text: str) -> bool:
    """Whether a text can be written: bytes of a command line that are not UTF-8 come as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_metadata(path: str | os.PathLike[str]) -> dict[str, object]:
    """Return the settings that `save_video` or `save_image` stored in a file.

    Args:
        path: a video or picture.

    Returns:
        The settings; empty when the file holds none, or a comment that is not ours.

    Raises:
        MediaNotFoundError: when there is no such file.
        MediaReadError: when it is neither a video nor a picture.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaNotFoundError(f"{path} {absence(path)}; give the path of a video or picture.")
    is_picture = path.suffix.lower() in (*IMAGE_SUFFIXES, ".gif")
    text = _picture_comment(path) if is_picture else _video_comment(path)
    try:
        settings = json.loads(text) if len(text) <= MAX_LENGTH else None
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def insert_gif_comment(path: Path, text: str) -> None:
    """Put a comment into a GIF file, which ffmpeg's muxer does not write itself.

    Source: GIF89a specification, section 24: 21 FE, then blocks of up to 255 bytes, each after its length,
    then 00. It goes behind the header (13 bytes) and the global colour table.
    """
    data = path.read_bytes()
    flags = data[10]
    start = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    raw = text.encode()
    blocks = b"".join(
        bytes([len(part)]) + part for part in (raw[i : i + 255] for i in range(0, len(raw), 255))
    )
    path.write_bytes(data[:start] + b"\x21\xfe" + blocks + b"\x00" + data[start:])


def _picture_comment(path: Path) -> str:
    try:
        with Image.open(path) as image:
            comment = image.info.get(TAG, "")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaReadError(f"{path} is not a picture that can be read: {error}.") from error
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)


def _video_comment(path: Path) -> str:
    av = pyav()
    try:
        with av.open(str(path)) as container:
            tags = {name.lower(): value for name, value in container.metadata.items()}
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise MediaReadError(f"{path} is not a video that can be read: {error}.") from error
    return str(tags.get(TAG, ""))

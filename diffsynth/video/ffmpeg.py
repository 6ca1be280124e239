"""PyAV, which brings ffmpeg. It is imported where a video is opened: pictures do without it."""

from __future__ import annotations

from typing import Any

from diffsynth.errors import MissingPackageError


def pyav() -> Any:
    """The module ``av``.

    Raises:
        MissingPackageError: where it is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise MissingPackageError("PyAV", "reading or writing a video", "pip install av") from error
    return av

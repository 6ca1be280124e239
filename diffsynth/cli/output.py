"""Where a command's videos and pictures go: found good before the work, written frame by frame, then told."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.errors import ArgumentError, DiffSynthError
from diffsynth.video import check_output_path, save_image, save_video
from diffsynth.video.encoding import choose_encoding, frame_rate
from diffsynth.video.paths import VIDEO_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger("diffsynth")

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")  # those that hold settings
ENCODER_OPTIONS = ("quality", "crf", "codec", "pix_fmt")
FPS = 16.0  # of the videos that Wan models are trained with
BYTES_PER_PIXEL = 0.5  # of a noisy video at the default quality; most need a tenth


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """The names of a run that died; the run that goes on takes them over."""

    run_id: str
    paths: tuple[Path, ...]  # `Output.paths` of that run


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where results go and how they are written."""

    paths: tuple[Path, ...]  # one per video
    run_id: str  # 8 hex digits; what the run keeps beside its videos has them in its name
    is_picture: bool
    fps: float | None  # None: the model's
    options: Mapping[str, Any]  # of save_video


def is_picture(out: Path) -> bool:
    """Whether a name asks for one picture."""
    return out.suffix.lower() in PICTURE_SUFFIXES


def check_output(
    out: Path,
    count: int,
    *,
    fps: float | None,
    options: Mapping[str, Any],
    need_bytes: int,
    resumed: Resumed | None = None,
) -> Output:
    """Make sure that the files can be written, before anything is loaded.

    Args:
        out: the name asked for; several videos are numbered NAME-1, NAME-2 ...
        count: number of videos.
        fps: frames per second; None: the model's.
        options: of the encoder, those that were given.
        need_bytes: estimated size of all files.
        resumed: the run that this one goes on with; None: a new run.

    Raises:
        OutputPathError: when a path cannot be written.
        ArgumentError: for options that the encoder cannot take.
    """
    if is_picture(out) and (options or fps is not None):
        raise ArgumentError(f"--out {out} is a picture; --fps and the encoder's options are for videos.")
    numbered = tuple(out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)) if count > 1 else (out,)
    if resumed is not None:
        numbered = resumed.paths
    for path in numbered:
        check_output_path(path, need_bytes=need_bytes, suffixes=VIDEO_SUFFIXES + PICTURE_SUFFIXES)
    if not is_picture(out):
        choose_encoding(out.suffix.lower(), **options)
        if fps is not None:
            frame_rate(fps)
    run_id = secrets.token_hex(4) if resumed is None else resumed.run_id
    return Output(paths=numbered, run_id=run_id, is_picture=is_picture(out), fps=fps, options=options)


def write_video(
    pipe: WanVideoPipeline,
    latents: Tensor,
    path: Path,
    output: Output,
    settings: Mapping[str, object],
    tiles: Mapping[str, Any],
) -> str:
    """Decode one video (1, C, T, h, w) straight into its file, and return a line that tells what was made.

    Args:
        pipe: holds the VAE.
        latents: of one video.
        path: one of ``output.paths``.
        output: how it is written.
        settings: go into the file; "fps" tells the rate of a video.
        tiles: of `pipe.decode_stream`.
    """
    import torch

    frames = pipe.decode_stream(latents, **tiles)
    try:
        if output.is_picture:
            save_image(next(frames), path, metadata=settings)
        else:
            save_video(frames, path, float(str(settings["fps"])), metadata=settings, **output.options)
    except torch.OutOfMemoryError as error:
        raise DiffSynthError(str(error)) from error
    assert pipe.parts.vae is not None
    num_latents, height, width = latents.shape[2:]
    num_frames = (num_latents - 1) * pipe.parts.vae.temporal_stride + 1
    scale, size = pipe.parts.vae.spatial_stride, path.stat().st_size
    amount = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
    length = "" if output.is_picture else f", {num_frames} frames at {settings['fps']:g} fps"
    return f"{path}: {width * scale}x{height * scale}{length}, {amount}"


class _PlainFormatter(logging.Formatter):
    """A message as it is; from warnings on its level stands in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def log_to_stderr(is_quiet: bool) -> Iterator[None]:
    """Show the log while a command runs; ``is_quiet`` leaves warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter())
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if is_quiet else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

"""Where a command's videos and pictures go: found good before the work, written frame by frame, then told."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.cli.naming import Names, Reserved, reserve
from diffsynth.errors import ArgumentError, DiffSynthError
from diffsynth.video import VideoWriter
from diffsynth.video.images import picture_comment, write_image
from diffsynth.video.paths import VIDEO_SUFFIXES, check_room, told_size
from diffsynth.video.settings import check_text

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from diffsynth.video import Frame

logger = logging.getLogger("diffsynth")

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")  # those that hold settings
ENCODER_OPTIONS = ("quality", "crf", "codec", "pix_fmt")
FPS = 16.0  # of the videos that Wan models are trained with
USUAL_SIZE = (480, 832)  # height and width in pixels, until the model tells its own
BYTES_PER_PIXEL = 0.1  # of an ordinary video at the default quality
_ROOM_FOR_SETTINGS = 4096  # bytes of a picture's comment, beside the prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where results go and how they are written; a context that gives the names back at its end."""

    names: Reserved
    is_picture: bool
    fps: float | None  # None: the model's
    options: Mapping[str, Any]  # of save_video
    texts: Mapping[str, object]  # prompts, which go into the file

    @property
    def paths(self) -> tuple[Path, ...]:
        """One per video."""
        return self.names.paths

    @property
    def run_id(self) -> str:
        """8 hex digits; what the run keeps beside its videos has them in its name."""
        return self.names.run_id

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.names.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What is known of the videos before they are made."""

    height: int  # pixels
    width: int
    num_frames: int
    latent_bytes: int = 0  # of one video, where latents are kept beside it

    @property
    def num_bytes(self) -> int:
        """Of one video with its latents, about."""
        return int(self.height * self.width * self.num_frames * BYTES_PER_PIXEL) + self.latent_bytes


def is_picture(out: Path) -> bool:
    """Whether a name asks for one picture."""
    return out.suffix.lower() in PICTURE_SUFFIXES


def check_output(
    names: Names,
    *,
    fps: float | None,
    options: Mapping[str, Any],
    texts: Mapping[str, object],
    size: Size | None,
) -> Output:
    """Make sure that the files can be written, and claim their names, before anything is loaded.

    Args:
        names: what is to be written.
        fps: frames per second; None: the model's.
        options: of the encoder, those that were given.
        texts: prompts, which go into the file.
        size: of the videos; None: not known yet, see `check_size`.

    Raises:
        OutputPathError: when a path cannot be written; see `reserve`.
        ArgumentError: for options that the encoder cannot take, or texts that cannot be kept in the file.
    """
    out = names.paths(1)[0]
    for name, text in texts.items():
        check_text(f"--{name.replace('_', '-')}" if name != "prompt" else "The prompt", text)
    if is_picture(out) and (options or fps is not None):
        raise ArgumentError(f"--out {out} is a picture; --fps and the encoder's options are for videos.")
    if is_picture(out):
        picture_comment(out, {**texts, "": " " * _ROOM_FOR_SETTINGS})
    output = Output(
        names=reserve(names, VIDEO_SUFFIXES + PICTURE_SUFFIXES), is_picture=is_picture(out), fps=fps,
        options=options, texts=texts,
    )  # fmt: skip
    try:
        check_size(output, size or Size(height=USUAL_SIZE[0], width=USUAL_SIZE[1], num_frames=1))
    except BaseException:
        output.names.release()
        raise
    return output


def check_size(output: Output, size: Size, fps: float = FPS) -> None:
    """Make sure that videos of this size can be written: by their encoder, and by what is free on the disk.

    Args:
        output: how they are written.
        size: of one video.
        fps: of the model, where ``output`` does not tell.

    Raises:
        OutputPathError: when the disk has less free than is needed.
        ArgumentError: when the encoder refuses.
    """
    target = Path(os.path.realpath(os.path.expanduser(output.paths[0])))
    check_room(target, size.num_bytes * len(output.paths))
    if not output.is_picture:
        rate = fps if output.fps is None else output.fps
        writer = VideoWriter(target, rate, metadata=output.texts, **output.options)
        writer.rehearse(size.height, size.width)


def write_video(
    pipe: WanVideoPipeline,
    latents: Tensor,
    path: Path,
    output: Output,
    settings: Mapping[str, object],
    tiles: Mapping[str, Any],
) -> tuple[Path, str]:
    """Decode one video (1, C, T, h, w) straight into its file; return where it is, and a line that tells it.

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
            made = write_image(next(frames), path, metadata=settings, overwrite=output.names.overwrites)
        else:
            made = _encoded(frames, path, output, settings)
    except torch.OutOfMemoryError as error:
        raise DiffSynthError(str(error)) from error
    assert pipe.parts.vae is not None
    num_latents, height, width = latents.shape[2:]
    num_frames = (num_latents - 1) * pipe.parts.vae.temporal_stride + 1
    scale, amount = pipe.parts.vae.spatial_stride, told_size(made.stat().st_size)
    length = "" if output.is_picture else f", {num_frames} frames at {settings['fps']:g} fps"
    made = as_spelled(path, made)
    return made, f"{made}: {width * scale}x{height * scale}{length}, {amount}"


def as_spelled(path: Path, made: Path) -> Path:
    """Return ``made``, the real path of a file that was to be ``path``, in the words of ``path``."""
    real = Path(os.path.realpath(path.expanduser()))
    if made == real:
        return path
    return path.with_name(made.name) if real.name == path.name else made


def _encoded(frames: Iterable[Frame], path: Path, output: Output, settings: Mapping[str, object]) -> Path:
    writer = VideoWriter(path, float(str(settings["fps"])), metadata=settings, **output.options)
    writer.overwrites = output.names.overwrites
    with writer:
        for frame in frames:
            writer.write(frame)
    return writer.path


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

"""``diffsynth generate``: everything that can be known to fail is checked before a model is loaded."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth import __version__
from diffsynth.cli.flags import FLAGS
from diffsynth.errors import ArgumentError, DiffSynthError, MissingModelError
from diffsynth.video import VideoData, check_output_path, save_image, save_video
from diffsynth.video.encoding import choose_encoding, frame_rate
from diffsynth.video.paths import VIDEO_SUFFIXES

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger("diffsynth")

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")  # those that hold settings
FPS = 16.0  # of the videos that Wan models are trained with
TINY_NOTE = (
    "No --model given: the tiny Wan that ships with diffsynth draws small moving shapes. "
    "A real one: --model FOLDER, or --model Wan-AI/Wan2.1-T2V-1.3B --download (17 GB)."
)
_USUAL_PIXELS = 480 * 832
_BYTES_PER_PIXEL = 0.5  # of a noisy video at the default quality; most need a tenth


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where results go and how they are written."""

    paths: tuple[Path, ...]  # one per video
    is_picture: bool
    fps: float | None  # None: the model's
    options: Mapping[str, Any]  # of save_video


def run_generate(prompt: str, given: Mapping[str, object]) -> None:
    """Make what was asked for, write it, and say what was written.

    Args:
        prompt: what to show.
        given: the values of `FLAGS`, without ``debug``.

    Raises:
        DiffSynthError: what was wrong, before a model is loaded where it can be known.
    """
    values = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    with _log_to_stderr(bool(values["quiet"])):
        arguments = _call_arguments(prompt, values)
        output = check_output(values, arguments)
        started = time.monotonic()
        pipe = _load(values)
        frames = _generate(pipe, arguments)
        videos = frames if arguments.get("num_videos_per_prompt", 1) > 1 else [frames]
        fps = output.fps or float(str(pipe.parts.generation.get("fps", FPS)))
        for index, (path, video) in enumerate(zip(output.paths, videos, strict=True)):
            settings = _settings(pipe, fps, index, is_picture=output.is_picture)
            if output.is_picture:
                save_image(video[0], path, metadata=settings)
            else:
                save_video(video, path, fps, metadata=settings, **output.options)
            typer.echo(_summary(path, video, settings, time.monotonic() - started))


def _call_arguments(prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `pipe()` is called with: only what was given, files opened."""
    names = [flag.name for flag in FLAGS if flag.is_call]
    arguments = {name: values[name] for name in names if values[name] is not None}
    if "input_video" in arguments:
        source: Path = arguments["input_video"]
        arguments["input_video"] = VideoData(image_folder=source) if source.is_dir() else VideoData(source)
    if values["quiet"]:
        arguments["progress_bar_cmd"] = _no_progress
    return {"prompt": prompt, **arguments}


def check_output(values: Mapping[str, Any], arguments: dict[str, Any]) -> Output:
    """Make sure that the files can be written, before anything is loaded.

    A name that ends in .png or .jpg asks for one frame.

    Args:
        values: of all flags.
        arguments: of `pipe()`; gets ``num_frames=1`` for a picture.

    Raises:
        OutputPathError: when a path cannot be written.
        ArgumentError: for several frames in a picture, or options that the encoder cannot take.
    """
    out: Path = values["out"]
    count = max(1, int(arguments.get("num_videos_per_prompt", 1)))
    is_picture = out.suffix.lower() in PICTURE_SUFFIXES
    options = {
        name: values[name] for name in ("quality", "crf", "codec", "pix_fmt") if values[name] is not None
    }
    if is_picture:
        if arguments.setdefault("num_frames", 1) != 1:
            raise ArgumentError(
                f"--out {out} is a picture and --num-frames is {arguments['num_frames']}; "
                "leave --num-frames out, or name a video, such as --out video.mp4."
            )
        if options or values["fps"] is not None:
            raise ArgumentError(f"--out {out} is a picture; --fps and the encoder's options are for videos.")
    pixels = arguments.get("height", 0) * arguments.get("width", 0) or _USUAL_PIXELS
    size = int(pixels * arguments.get("num_frames", 81) * _BYTES_PER_PIXEL * count)
    numbered = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)] if count > 1 else [out]
    for path in numbered:
        check_output_path(path, need_bytes=max(0, size), suffixes=VIDEO_SUFFIXES + PICTURE_SUFFIXES)
    if not is_picture:
        choose_encoding(out.suffix.lower(), **options)
        if values["fps"] is not None:
            frame_rate(values["fps"])
    return Output(paths=tuple(numbered), is_picture=is_picture, fps=values["fps"], options=options)


def _load(values: Mapping[str, Any]) -> WanVideoPipeline:
    paths: list[str] = values["model"]
    if not paths:
        from diffsynth.tiny import tiny_folder

        if not any(tiny_folder().glob("*.safetensors")):
            raise MissingModelError(
                f"The tiny Wan is missing from this installation ({tiny_folder()} holds no weights); "
                "install diffsynth again, or give --model."
            )
        logger.info(TINY_NOTE)

    import torch

    from diffsynth.pipelines.wan_video import WanVideoPipeline

    chosen: Any = paths or str(tiny_folder())
    return WanVideoPipeline.from_pretrained(
        chosen[0] if len(paths) == 1 else chosen,
        torch_dtype=getattr(torch, values["dtype"] or ("bfloat16" if paths else "float32")),
        device=values["device"] or (None if paths else "cpu"),
        download=values["download"],
        dit=values["dit"] or None,
        tokenizer_path=values["tokenizer_path"],
        precision=values["precision"] or "official",
    )


def _generate(pipe: WanVideoPipeline, arguments: Mapping[str, Any]) -> Any:
    import torch

    try:
        return pipe(**arguments)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise DiffSynthError(
            f"The GPU's memory does not suffice: {reason}. Ask for a smaller --height, --width or "
            "--num-frames, add --tiled, or use a smaller model."
        ) from error


def _settings(pipe: WanVideoPipeline, fps: float, index: int, *, is_picture: bool) -> dict[str, object]:
    """What goes into the file: enough to make it again, and no path of this machine."""
    settings = {name: value for name, value in pipe.last_settings.items() if value not in ("", None)}
    seed = settings.get("seed")
    if isinstance(seed, int):
        settings["seed"] = seed + index
    for name in ("num_videos_per_prompt", "strict"):  # of the run, not of this video
        settings.pop(name, None)
    sources = {part: "/".join(Path(source).parts[-2:]) for part, source in pipe.parts.sources.items()}
    rate = {} if is_picture else {"fps": fps}
    return {"diffsynth": __version__, **settings, **rate, "precision": pipe.precision, "models": sources}


def _summary(path: Path, video: list[Image], settings: Mapping[str, object], seconds: float) -> str:
    width, height = video[0].size
    size = path.stat().st_size
    amount = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
    length = "" if "fps" not in settings else f", {len(video)} frames at {settings['fps']:g} fps"
    return f"{path}: {width}x{height}{length}, {amount}, seed {settings.get('seed')}, {seconds:.1f} s"


def _no_progress(steps: Iterable[Any]) -> Iterable[Any]:
    return steps


class _PlainFormatter(logging.Formatter):
    """A message as it is; from warnings on its level stands in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def _log_to_stderr(is_quiet: bool) -> Iterator[None]:
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

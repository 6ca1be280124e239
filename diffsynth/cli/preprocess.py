"""``diffsynth preprocess``: a control video out of an ordinary one, frame by frame."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth.cli.naming import Names, naming_of, reserved
from diffsynth.cli.output import FPS, PICTURE_SUFFIXES, as_spelled, log_to_stderr
from diffsynth.errors import ArgumentError
from diffsynth.video import VideoData, VideoWriter, load_image, picture_size
from diffsynth.video.encoding import frame_rate
from diffsynth.video.images import write_image
from diffsynth.video.paths import VIDEO_SUFFIXES
from diffsynth.video.preprocess import TASKS, Options, preprocess
from diffsynth.video.vace_recipes import layout

if TYPE_CHECKING:
    from diffsynth.video import Frame

LAYOUT = "layout"  # drawn from boxes; the others are drawn from the frames


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessRequest:
    """What the command was given."""

    source: Path  # a video, a picture, or a folder of pictures
    out: Path
    task: str
    boxes: Path | None
    options: Options
    fps: float | None  # None: the source's
    overwrite: bool = False  # a file that has the name of ``out``


def run_preprocess(request: PreprocessRequest) -> None:
    """Write the control video, and say what was written.

    Raises:
        DiffSynthError: what was wrong with the source, the task or the place; nothing half-written is left.
    """
    if request.task != LAYOUT and request.boxes is not None:
        raise ArgumentError(f"--boxes is for --task {LAYOUT}; task {request.task!r} does not read it.")
    is_picture = request.out.suffix.lower() in PICTURE_SUFFIXES
    if is_picture and request.fps is not None:
        raise ArgumentError(f"{request.out} is a picture; --fps is for videos.")
    if request.fps is not None:
        frame_rate(request.fps)
    if request.options.device != Options().device:
        from diffsynth.ops.devices import known_device

        known_device(request.options.device, "--device")
    names = Names(
        out=request.out, naming=naming_of(is_named=True, overwrite=request.overwrite),
        inputs=[each for each in (request.source, request.boxes, request.options.model) if each is not None],
    )  # fmt: skip
    with log_to_stderr(is_quiet=False), reserved(names, (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES)) as found:
        source, fps = _opened(request.source, is_picture=is_picture)
        made = _layout(request, source) if request.task == LAYOUT else _drawn(request, source)
        (out,) = found.paths
        if is_picture:
            real = write_image(next(iter(made)), out, overwrite=found.overwrites)
            typer.echo(f"{as_spelled(out, real)}: {request.task}, a picture")
            return
        rate = fps if request.fps is None else request.fps
        with VideoWriter(out, rate) as writer:
            writer.overwrites = found.overwrites
            for frame in made:
                writer.write(frame)
        typer.echo(f"{as_spelled(out, writer.path)}: {request.task}, {len(source)} frames at {rate:g} fps")


def _opened(path: Path, *, is_picture: bool) -> tuple[Any, float]:
    """The frames of a source, and how many there are in a second."""
    if path.suffix.lower() in (*PICTURE_SUFFIXES, ".webp", ".bmp") and not path.is_dir():
        frames: list[Frame] = [load_image(path)]
        if not is_picture:
            raise ArgumentError(f"{path} is a picture; name a picture to be made, such as out.png.")
        return frames, FPS
    video = VideoData(image_folder=path) if path.is_dir() else VideoData(path)
    if is_picture and len(video) > 1:
        raise ArgumentError(f"{path} has {len(video)} frames; name a video to be made, such as out.mp4.")
    return video, video.fps or FPS


def _drawn(request: PreprocessRequest, source: Any) -> Iterable[Frame]:
    return preprocess(source, request.task, request.options)


def _layout(request: PreprocessRequest, source: Any) -> Iterable[Frame]:
    if request.boxes is None:
        raise ArgumentError(
            f"--task {LAYOUT} needs --boxes FILE: JSON, a list of tracks, each "
            '{"FRAME": [left, top, right, bottom], ...}.'
        )
    if request.options != Options():
        raise ArgumentError(
            f"--model, --download, --device and --thresholds are not read by --task {LAYOUT}."
        )
    height, width = picture_size(source[0])
    return layout(_tracks(request.boxes), num_frames=len(source), height=height, width=width).video


def _tracks(path: Path) -> list[dict[int, tuple[float, float, float, float]]]:
    """Read tracks of boxes from a JSON file."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        tracks = [told] if isinstance(told, dict) else told
        return [
            {int(frame): (float(a), float(b), float(c), float(d)) for frame, (a, b, c, d) in track.items()}
            for track in tracks
        ]
    except OSError as error:
        raise ArgumentError(f"--boxes {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"--boxes {path} holds no boxes ({error}); give JSON: a list of tracks, each "
            '{"FRAME": [left, top, right, bottom], ...}.'
        ) from None


TASK_NAMES = (*TASKS, LAYOUT)

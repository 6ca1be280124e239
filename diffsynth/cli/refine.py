"""``diffsynth refine``: a preview made large. Same prompt and seed; noise is laid over the enlarged video.

Everything that the preview's file tells is as it was, unless a flag says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from diffsynth.checkpoints.named import printable
from diffsynth.cli.flags import FLAGS, Flag, command_line
from diffsynth.cli.generate_task import parse_size, renamed, switch
from diffsynth.cli.origins import with_origins
from diffsynth.cli.output import is_picture
from diffsynth.cli.preview import KEY
from diffsynth.cli.task_flags import BESIDE_FLAGS, NOT_REFINED, REFINE_FLAGS, TASK_FLAGS
from diffsynth.errors import ArgumentError, UnusedInputError
from diffsynth.video import read_metadata

STRENGTH = 0.5  # keeps shapes, colours and motion, and draws detail anew
LARGER = 2  # each side, where neither --size nor the file says more
TASK_READS = (
    "task", "prompt_text", "size", "input_video_path", "ckpt_dir", "save_file", "base_seed", "sample_solver",
    "sample_steps", "sample_shift", "sample_guide_scale", "offload_model", "t5_cpu", "convert_model_dtype",
)  # fmt: skip


def run_refine(prompt: str | None, given: Mapping[str, object]) -> None:
    """Make the large video, write it, and say what was written.

    Args:
        prompt: None: the file's.
        given: the values of `REFINE_FLAGS`, without ``debug``.

    Raises:
        DiffSynthError: what was wrong, before a model is loaded where it can be known.
    """
    from diffsynth.cli.generate import make
    from diffsynth.cli.output import log_to_stderr

    values: dict[str, Any] = {
        name: value.value if isinstance(value, Enum) else value for name, value in given.items()
    }
    source = values.pop("source")
    with log_to_stderr(bool(values["quiet"])):
        make(*refined(source, prompt, values))


def refined_by_task(prompt: str | None, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The same as `refined` for ``generate --task video_super_resolution --input_video_path FILE``.

    Args:
        prompt: None: the file's.
        values: of `FLAGS` and `TASK_FLAGS`.

    Raises:
        ArgumentError, UnusedInputError: as `refined`, and for flags that this task does not read.
    """
    own = {flag.name: flag.default for flag in TASK_FLAGS}
    unread = [flag for flag, default in own.items() if values[flag] != default and flag not in TASK_READS]
    unread += [flag for flag in NOT_REFINED if values[flag] not in (None, False)]
    if unread:
        raise UnusedInputError(f"--{unread[0]} is not read by --task video_super_resolution; leave it out.")
    if values["input_video_path"] is None:
        raise ArgumentError("--task video_super_resolution needs --input_video_path FILE.")
    given = {flag: values[flag] for flag in TASK_READS if values[flag] is not None}
    ours = {name: value for name, value in values.items() if name not in own}
    where = {"offload": switch(given.get("offload_model", "True")), "t5_cpu": bool(given["t5_cpu"])}
    overwrite = ours["overwrite"] or "save_file" in given  # as generate.py does
    ours.update(renamed(given, ours), size=values["size"], overwrite=overwrite)
    told, merged = refined(values["input_video_path"], prompt, ours)
    return told, {**merged, **where}


def refined(source: Path | None, prompt: str | None, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the prompt and the values of `FLAGS` with which ``generate`` refines a video.

    Args:
        source: the video or picture, with its settings inside.
        prompt: None: the file's.
        values: of the flags that were given; they win.

    Raises:
        ArgumentError: for a file without settings or with impossible ones, or a size told twice.
        MediaNotFoundError, MediaReadError: when the file cannot be read.
        CheckpointNotFoundError, AmbiguousModelError: see `with_origins`.
    """
    from diffsynth.pipelines.presets import preset_values

    if source is None:
        raise ArgumentError("--from is missing; give the video to go on from: --from video-2.mp4.")
    settings = read_metadata(source)
    told = settings.get("prompt", "") if prompt is None else prompt
    if not isinstance(told, str) or "seed" not in settings:
        raise ArgumentError(
            f"{source} does not tell how it was made; diffsynth generate keeps that in its files, and many "
            "programs drop it. For a video of another program: diffsynth generate PROMPT --input-video FILE "
            "--denoising-strength 0.5 --height 720 --width 1280."
        )
    merged = {**{flag.name: flag.default for flag in FLAGS}, **values, **BESIDE_FLAGS}
    merged.update(read_files=(source,), has_default_out=merged["out"] is None)
    if merged["has_default_out"]:
        merged["out"] = source.with_stem(f"{source.stem}-refined")
    calls = {f.name for f in FLAGS if f.argument is not None and f.argument.refined == "kept"}
    calls -= preset_values({"preset": merged["preset"]}).keys()
    calls |= {"precision"} if is_picture(merged["out"]) else {"precision", "fps"}
    for flag in FLAGS:
        if flag.name in calls and merged[flag.name] in (None, [], ()) and settings.get(flag.name) is not None:
            merged[flag.name] = _setting(source, settings, flag)
            if merged[flag.name] is not None:
                merged["from_file"] = (*merged["from_file"], flag.name)
    merged["input_video"] = source
    if merged["denoising_strength"] is None:
        merged["denoising_strength"] = STRENGTH
    merged.update(_size(source, settings, values))
    if merged["num_inference_steps"] is None and merged["preset"] is None:
        merged["num_inference_steps"] = _steps(settings, merged["denoising_strength"])
    typed = command_line(["diffsynth", "refine"], {**values, "source": source}, REFINE_FLAGS)
    return told, with_origins(source, settings, merged, typed)


def _setting(source: Path, settings: Mapping[str, object], flag: Flag) -> Any:
    """The file's value of a flag; None where the flag names files, which a file may not choose."""
    value, kind = settings[flag.name], flag.kind
    if kind in (Path, list[Path]):
        return None
    if kind is float and isinstance(value, int):
        value = float(value) if abs(value) < 2**53 else None
    choices = [each.value for each in kind] if isinstance(kind, type) and issubclass(kind, Enum) else None
    if choices is not None:
        is_fine = value in choices
    elif kind == tuple[int, int]:
        is_fine = isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))
        value = tuple(value) if isinstance(value, list) else value
    elif kind is float:
        is_fine = isinstance(value, float) and math.isfinite(value)
    else:
        is_fine = _is_whole(value) if kind is int else isinstance(value, kind)
    if not is_fine:
        spelling = command_line((), {flag.name: "VALUE"}, [flag])
        raise ArgumentError(
            f"{source} tells {flag.name} is {printable(repr(settings[flag.name]), 60)}, which cannot be; it "
            f"was changed. Give it yourself: {spelling}."
        )
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64


def _size(source: Path, settings: Mapping[str, object], values: Mapping[str, Any]) -> dict[str, int]:
    """Height and width: as asked, else of the full run, else twice those of the file."""
    given = {side: values[side] for side in ("height", "width") if values.get(side) is not None}
    if values.get("size") is not None:
        if given:
            raise ArgumentError(f"--size replaces --{' and --'.join(given)}; give one or the other.")
        width, height = parse_size(values["size"])
        return {"height": height, "width": width}
    own = {side: _count(settings.get(side)) for side in ("height", "width")}
    if not all(own.values()):
        raise ArgumentError(f"{source} does not tell its own size; give --size WIDTH*HEIGHT.")
    full = _full_run(settings)
    area = _count(full.get("max_area"))
    scale = math.sqrt(area / (own["height"] * own["width"])) if area else 1.0
    sides = {side: round(pixels * scale / 32) * 32 for side, pixels in own.items()}
    wanted = {side: _count(full.get(side)) or sides[side] for side in own}
    return {**(wanted if full else {side: LARGER * pixels for side, pixels in own.items()}), **given}


def _steps(settings: Mapping[str, object], strength: float) -> int:
    """As many as the full run has below the noise level where this one begins."""
    steps = _count(_full_run(settings).get("num_inference_steps")) or _count(
        settings.get("num_inference_steps")
    )
    return max(1, math.ceil((steps or 50) * strength))


def _full_run(settings: Mapping[str, object]) -> Mapping[str, object]:
    """Size and steps of the run that a preview was made for; empty for another video."""
    full = settings.get(KEY)
    return full if isinstance(full, Mapping) else {}


def _count(value: object) -> int:
    """A number of pixels or steps; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else 0

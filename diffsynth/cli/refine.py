"""``diffsynth refine``: a preview made large. Same prompt and seed; noise is laid over the enlarged video.

Everything that the preview's file tells is as it was, unless a flag says otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from diffsynth.cli.flags import FLAGS
from diffsynth.cli.generate_task import parse_size, renamed
from diffsynth.cli.output import is_picture
from diffsynth.cli.preview import KEY
from diffsynth.cli.task_flags import BESIDE_FLAGS, NOT_REFINED, TASK_FLAGS
from diffsynth.errors import ArgumentError, UnusedInputError
from diffsynth.video import load_image, read_metadata

logger = logging.getLogger("diffsynth")

STRENGTH = 0.5  # keeps shapes, colours and motion, and draws detail anew
LARGER = 2  # each side, where neither --size nor the file says more
# settings of the file that are no wish for the next run: resolved since, or of that run alone
_OF_THAT_RUN = ("height", "width", "max_area", "denoising_strength", "num_inference_steps", "preset")
TASK_READS = (
    "task", "prompt_text", "size", "input_video_path", "ckpt_dir", "save_file", "base_seed", "sample_solver",
    "sample_steps", "sample_shift", "sample_guide_scale",
)  # fmt: skip
_LEFT_OUT = {"strict": False, "preview": False}  # values of flags that refine does not have


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
        make(*refined(source, prompt, {**values, **_LEFT_OUT}))


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
    overwrite = ours["overwrite"] or "save_file" in given  # as generate.py does
    told = {**ours, **renamed(given, ours), "size": values["size"], "overwrite": overwrite}
    return refined(values["input_video_path"], prompt, told)


def refined(source: Path | None, prompt: str | None, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the prompt and the values of `FLAGS` with which ``generate`` refines a video.

    Args:
        source: the video or picture, with its settings inside.
        prompt: None: the file's.
        values: of the flags that were given; they win.

    Raises:
        ArgumentError: for a file without settings, or a size told twice.
        MediaNotFoundError, MediaReadError: when the file cannot be read.
    """
    from diffsynth.pipelines.presets import preset_values

    if source is None:
        raise ArgumentError("--from is missing; give the video to go on from: --from video-2.mp4.")
    settings = read_metadata(source)
    told = settings.get("prompt") if prompt is None else prompt
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
    calls = {flag.name for flag in FLAGS if flag.is_call} - {*_OF_THAT_RUN, *NOT_REFINED}
    calls -= preset_values({"preset": merged["preset"]}).keys()
    for name in (*sorted(calls), "precision", *(() if is_picture(merged["out"]) else ("fps",))):
        if merged[name] in (None, [], ()) and name in settings:
            merged[name] = settings[name]
    merged["input_video"] = [load_image(source)] if is_picture(source) else source
    if merged["denoising_strength"] is None:
        merged["denoising_strength"] = STRENGTH
    merged.update(_size(source, settings, values))
    if merged["num_inference_steps"] is None and merged["preset"] is None:
        merged["num_inference_steps"] = _steps(settings, merged["denoising_strength"])
    _tell_what_is_not_inside(source, settings, merged)
    return told, merged


def _size(source: Path, settings: Mapping[str, object], values: Mapping[str, Any]) -> dict[str, int]:
    """Height and width: as asked, else of the full run, else twice those of the file."""
    given = {side: values[side] for side in ("height", "width") if values.get(side) is not None}
    if values.get("size") is not None:
        if given:
            raise ArgumentError(f"--size replaces --{' and --'.join(given)}; give one or the other.")
        width, height = parse_size(values["size"])
        return {"height": height, "width": width}
    own = {side: int(str(settings.get(side, 0))) for side in ("height", "width")}
    if not all(own.values()):
        raise ArgumentError(f"{source} does not tell its own size; give --size WIDTH*HEIGHT.")
    full = settings.get(KEY)
    wanted = {side: LARGER * pixels for side, pixels in own.items()}
    if isinstance(full, Mapping):
        area = full.get("max_area")
        scale = math.sqrt(float(area) / (own["height"] * own["width"])) if area else 1.0
        wanted = {side: int(full.get(side, round(own[side] * scale / 32) * 32)) for side in own}
    return {**wanted, **given}


def _steps(settings: Mapping[str, object], strength: float) -> int:
    """As many as the full run has below the noise level where this one begins."""
    full = settings.get(KEY)
    steps = full.get("num_inference_steps") if isinstance(full, Mapping) else None
    steps = settings.get("num_inference_steps") if steps is None else steps
    return max(1, math.ceil(int(str(steps or 50)) * strength))


def _tell_what_is_not_inside(source: Path, settings: Mapping[str, object], values: Mapping[str, Any]) -> None:
    models, loras = settings.get("models"), settings.get("loras")
    if isinstance(models, Mapping) and not values["model"]:
        logger.info("%s was made with %s.", source, ", ".join(map(str, models.values())))
    if isinstance(loras, Mapping) and not values["lora"]:
        names = " ".join(f"--lora {name}:{strength}" for name, strength in loras.items())
        logger.warning("%s was made with LoRAs, and none is given now: %s", source, names)

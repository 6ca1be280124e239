"""``diffsynth generate --preview``: the same command small and fast, with several seeds, to choose from.

What a full run would have had stays in each file, so that `diffsynth refine` knows it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.cli.flags import FLAGS, command_line
from diffsynth.cli.output import as_spelled, is_picture
from diffsynth.cli.task_flags import REFINE_FLAGS
from diffsynth.cli.tasks import REFINE_TASK
from diffsynth.video import VideoData, load_image
from diffsynth.video.contact_sheet import Cell, Layout, contact_sheet, size_in
from diffsynth.video.images import write_image

if TYPE_CHECKING:
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.video import Frame

logger = logging.getLogger("diffsynth")

NUM_SEEDS = 4  # where --num-videos-per-prompt does not say
SHARE = 0.5  # of each side: a preview has a quarter of the pixels
SHORT_SIDE = 240  # pixels that the shorter side keeps, if it has them: smaller, models draw other things
STEP_PARTS = 4  # of the steps, but not fewer than
FEW_STEPS = 8  # unless the run itself has fewer
MOMENTS = 4  # of each video on the sheet
SHEET_WIDTH = 1680  # pixels
KEY = "preview_of"  # in the settings of a preview: size and steps of the full run


def smaller(arguments: Mapping[str, Any], parts: PipelineComponents) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a preview, and what the full run has in their place.

    Args:
        arguments: of `pipe()`, for the full run.
        parts: of the pipeline; tell what the model does where the arguments do not.
    """
    from diffsynth.pipelines.presets import preset_values
    from diffsynth.pipelines.request import size_multiples, usual_values

    usual = {**usual_values(parts), **preset_values(arguments)}
    full: dict[str, Any] = {
        name: arguments.get(name, usual.get(name)) for name in ("height", "width", "num_inference_steps")
    }
    small = dict(full)
    share = share_of(min(full["height"], full["width"]))
    for side, multiple in zip(("height", "width"), size_multiples(parts), strict=True):
        small[side] = max(1, round(full[side] * share / multiple)) * multiple
    small["num_inference_steps"] = few_steps(full["num_inference_steps"])
    if arguments.get("max_area") is not None:
        for side in ("height", "width"):
            del full[side], small[side]
        full["max_area"] = arguments["max_area"]
        small["max_area"] = int(arguments["max_area"] * share_of(math.isqrt(arguments["max_area"])) ** 2)
    told = [", ".join(f"{name} {value}" for name, value in each.items()) for each in (small, full)]
    logger.info("Preview: %s; the full run has %s.", *told)
    return {**arguments, **small}, full


def share_of(short_side: int) -> float:
    """What a preview has of each side, where the shorter one has so many pixels."""
    return min(1.0, max(SHARE, SHORT_SIDE / short_side))


def few_steps(steps: int) -> int:
    """A quarter of the steps; all of a run that has few."""
    return max(min(steps, FEW_STEPS), -(-steps // STEP_PARTS))


def save_sheet(
    paths: Sequence[Path], settings: Sequence[Mapping[str, object]], target: Path, *, overwrite: bool
) -> str:
    """Write the contact sheet of previews, and return a line that tells what was made.

    Args:
        paths: of the previews, as they were written.
        settings: of each.
        target: .png.
        overwrite: whether a file of this name is replaced.
    """
    cells = [
        Cell(pictures=_moments(path), title=f"{path.name}   seed {each.get('seed')}")
        for path, each in zip(paths, settings, strict=True)
    ]
    count = len(cells[0].pictures)
    size = size_in(cells[0].pictures[0], num_pictures=count, width=SHEET_WIDTH)
    sheet = contact_sheet(cells, Layout(size=size, num_pictures=count, num_lines=0, columns=1))
    about = {**settings[0], "sheet_of": [path.name for path in paths]}
    made = as_spelled(target, write_image(sheet, target, metadata=about, overwrite=overwrite))
    return f"{made}: {len(paths)} previews"


def line_for_refining(path: Path, values: Mapping[str, Any]) -> str:
    """The command that makes a preview large: with the flags that its file does not tell.

    Args:
        path: of the preview.
        values: of the run, by names of `FLAGS`, with ``offload`` and ``t5_cpu``.
    """
    files = [flag.name for flag in FLAGS if flag.kind in (Path, list[Path])]
    inside = {flag.name for flag in FLAGS if flag.is_call} - {*files} | {"precision", "fps", "out"}
    flags = [flag for flag in REFINE_FLAGS if flag.name not in inside]
    if not (values["offload"] or values["t5_cpu"]):
        return command_line(["diffsynth", "refine", "--from", str(path)], values, flags)
    words = ["diffsynth", "generate", "--task", REFINE_TASK, "--input_video_path", str(path)]
    words += [] if values["offload"] else ["--offload_model", "False"]
    return command_line(words + ["--t5_cpu"] * bool(values["t5_cpu"]), values, flags)


def _moments(path: Path) -> tuple[Frame, ...]:
    if is_picture(path):
        return (load_image(path),)
    video = VideoData(path)
    last = len(video) - 1
    return tuple(video[round(last * moment / (MOMENTS - 1))] for moment in range(MOMENTS))

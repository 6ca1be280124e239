"""A line of Wan's own ``generate.py`` as values of our flags: ``diffsynth generate --task t2v-14B ...``.

What a line leaves out is as officially; what this version lacks, or the task does not read, is told before
anything is loaded.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from diffsynth.cli.flags import FLAGS
from diffsynth.cli.output import is_picture
from diffsynth.cli.task_flags import BESIDE_FLAGS, EXTEND_FLAGS, GPUS_FLAGS, TASK_FLAGS
from diffsynth.cli.tasks import TASKS, USUAL_TASK, USUAL_TASK_22, Task
from diffsynth.errors import ArgumentError, UnusedInputError
from diffsynth.video import VideoData
from diffsynth.video.probing import probe_media

if TYPE_CHECKING:
    from diffsynth.video import Frame

logger = logging.getLogger("diffsynth")

# flag of generate.py -> ours
RENAMED = {official: flag.name for flag in FLAGS for official in flag.official}
SEVERAL = [flag.name for flag in FLAGS if flag.argument is not None and flag.argument.kind == "pictures"]
ANYWHERE = ("prompt_text", "size")  # what is read without --task as well
SIZE = re.compile(r"(\d+)\s*[*x×]\s*(\d+)")
SWITCHES = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def with_example(prompt: str | None, values: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return prompt and values, with what generate.py takes where a line leaves out the task or the prompt.

    Args:
        prompt: None: the line has none.
        values: of `FLAGS` and of `TASK_FLAGS`.

    Returns:
        The prompt is None where none is given and no task has an example.

    Raises:
        ArgumentError: for a task that this version lacks, or an example whose pictures are not here.
    """
    filled = dict(values)
    if values["task"] is None and values["ckpt_dir"] is not None:
        filled["task"] = _usual_task(values)
        logger.info("--task is not given: %s, as of generate.py of that version.", filled["task"])
    name = filled["task"]
    if name is None:
        return prompt, filled
    task = TASKS[name]
    _check_lacks(name, task, {})
    if prompt is not None or not task.example or values["input_video"] is not None:
        return prompt, filled
    if not any(values[flag] for flag in task.reads):
        for flag, files in task.example_files:
            paths = [Path(each) for each in files.split(",")]
            if missing := [str(path) for path in paths if not path.is_file()]:
                raise ArgumentError(
                    f"--task {name} without --prompt is the official example, with --{flag} {files}; "
                    f"{', '.join(missing)} of Wan's repository is not in this folder. Give --prompt, and "
                    f"--{flag} of your own."
                )
            filled[flag] = paths[0] if flag in task.needs else files
    logger.info("--prompt is not given: the official example of --task %s, %r.", name, task.example)
    return task.example, filled


def _usual_task(values: Mapping[str, Any]) -> str:
    """The task of a line without one: Wan2.2's for two experts, or where a flag is of that version."""
    has_two_experts = (Path(values["ckpt_dir"]).expanduser() / "high_noise_model").is_dir()
    return USUAL_TASK_22 if has_two_experts or values["convert_model_dtype"] else USUAL_TASK


def with_task(prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of our flags, with those of generate.py's flags and the task's own in them.

    No picture is opened, and of videos only the one that sets the size. Beside the flags, the result has
    `BESIDE_FLAGS`.

    Args:
        prompt: what to show.
        values: of `FLAGS` and of `TASK_FLAGS`.

    Raises:
        ArgumentError: for what this version lacks, one thing told twice, or a value that cannot work.
        UnusedInputError: for a flag that the task does not read.
    """
    own = {flag.name: flag.default for flag in TASK_FLAGS}
    kept = {name: value for name, value in values.items() if name not in own}
    given = {name: values[name] for name in own if values[name] is not None and values[name] is not False}
    name = given.get("task")
    if name is None:
        if unread := [flag for flag in given if flag not in ANYWHERE]:
            instead = (
                f", or --{RENAMED[unread[0]].replace('_', '-')} in its place" if unread[0] in RENAMED else ""
            )
            raise UnusedInputError(
                f"--{unread[0]} is a flag of Wan's generate.py: give --task or --ckpt_dir as well{instead}."
            )
        return {**kept, **_told_size(given, kept), **BESIDE_FLAGS}
    task = TASKS[name]
    _check_lacks(name, task, given)
    _check_read(name, task, given)
    _told_size(given, kept)
    told = renamed(given, kept)
    usual = _official(name, task, given, {**kept, **told})
    usual = {flag: value for flag, value in usual.items() if not _is_there(kept[flag])}
    merged = {**kept, **usual, **told}
    if "src_video" in given:
        merged.update(_of_source(task, given, kept))
    if not merged["model"]:
        raise ArgumentError(f"--task {name} needs --ckpt_dir FOLDER, the folder of its model.")
    has_default_out = merged["out"] is None
    if has_default_out:
        size = parse_size(given["size"]) if "size" in given else (merged["width"], merged["height"])
        size = (size[0] or task.width, size[1] or task.height)
        merged["out"] = Path(official_name(name, task, size, prompt))
    if merged["fps"] is None and not is_picture(merged["out"]):
        merged["fps"] = task.fps
    if given.get("convert_model_dtype") and merged["dtype"] not in (None, "bf16", "bfloat16"):
        raise ArgumentError(
            f"--convert_model_dtype keeps the weights in bfloat16 and --dtype is {merged['dtype']}; give one."
        )
    return {
        **merged,
        **BESIDE_FLAGS,
        "from_file": tuple(usual),  # the task's, not the caller's
        "has_default_out": has_default_out,
        "overwrite": kept["overwrite"] or "save_file" in given,  # as generate.py does
        "read_files": [given[name] for name in ("src_video", "src_mask") if name in given],
        "offload": switch(given.get("offload_model", "True")),
        "t5_cpu": bool(given.get("t5_cpu")),
    }


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height of ``1280*720`` or ``1280x720``.

    Raises:
        ArgumentError: for anything else.
    """
    found = SIZE.fullmatch(text.strip())
    width, height = map(int, found.groups()) if found else (0, 0)
    if not width or not height:
        raise ArgumentError(f"--size is {text!r}; give WIDTH*HEIGHT in pixels, such as 832*480.")
    return width, height


def official_name(name: str, task: Task, size: tuple[int, int], prompt: str) -> str:
    """The file that generate.py writes when none is named: task, width and height, GPUs, prompt, time.

    Source: Wan2.1 and Wan2.2 ``generate.py``.
    """
    told = f"{size[0]}{'x' if os.name == 'nt' else '*'}{size[1]}"
    text = re.sub(r"[\s/\\]", "_", prompt)[:50]
    return f"{name}_{told}_{'1_' * task.parallel}{text}_{time.strftime('%Y%m%d_%H%M%S')}{task.suffix}"


def _check_lacks(name: str, task: Task, given: Mapping[str, Any]) -> None:
    if task.lacks:
        raise ArgumentError(
            f"--task {name}: {task.lacks} is not in this version, which knows its files by name alone "
            "(diffsynth inspect FILE). The README lists the models that run."
        )
    gpus = [flag for flag in GPUS_FLAGS if flag in given and (given[flag] is True or given[flag] > 1)]
    if gpus:
        told = ", ".join(f"--{flag}" + ("" if given[flag] is True else f" {given[flag]}") for flag in gpus)
        raise ArgumentError(
            f"{told}: one video on several GPUs is not in this version. Leave this out: one GPU makes it, "
            "and --vram 12 keeps within so many GiB."
        )
    if extend := [flag for flag in EXTEND_FLAGS if flag in given]:
        raise ArgumentError(
            f"{', '.join(f'--{flag}' for flag in extend)}: a language model that extends the prompt is not "
            "in this version. Leave this out, and give the whole prompt."
        )


def _check_read(name: str, task: Task, given: Mapping[str, Any]) -> None:
    readers = {flag: [each for each, row in TASKS.items() if flag in row.reads] for flag in given}
    readers["input_video_path"] = ["video_super_resolution"]
    for flag in given:
        if flag not in task.reads and readers[flag]:
            raise UnusedInputError(
                f"--{flag} is not read by --task {name}; it is for {', '.join(readers[flag])}."
            )
    if missing := [flag for flag in task.needs if flag not in given]:
        raise ArgumentError(f"--task {name} needs {' and '.join(f'--{flag} FILE' for flag in missing)}.")
    if task.num_frames == 1 and given.get("frame_num", 1) != 1:
        raise ArgumentError(
            f"--task {name} makes a picture and --frame_num is {given['frame_num']}; leave it out."
        )
    if "src_mask" in given and "src_video" not in given:
        raise ArgumentError("--src_mask is a mask of --src_video, which is missing; give both.")


def renamed(given: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return what generate.py's flags say, by the names of ours.

    Args:
        given: flags of generate.py.
        kept: values of ours.

    Raises:
        ArgumentError: for a flag of which ours is given as well.
    """
    told: dict[str, Any] = {}
    for flag, ours in RENAMED.items():
        if flag not in given:
            continue
        if _is_there(kept[ours]):
            raise ArgumentError(
                f"--{flag} and --{ours.replace('_', '-')} are two names of one thing; give one of them."
            )
        told[ours] = given[flag]
    if "model" in told:
        told["model"] = [told["model"]]
    if told.get("seed", 0) < 0:
        del told["seed"]
    for name in (name for name in SEVERAL if name in told):
        told[name] = [Path(path) for path in told[name].split(",") if path]
    return told


def _official(name: str, task: Task, given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the task does where nothing else is told.

    Args:
        name: of the task.
        task: its row.
        given: flags of generate.py.
        values: of our flags, with what ``given`` says of them.
    """
    size = parse_size(given["size"]) if "size" in given else (task.width, task.height)
    is_small = set(size) == {832, 480}
    values_of_task: dict[str, Any] = {
        "num_frames": task.num_frames,
        "num_inference_steps": task.steps,
        "sigma_shift": task.shift if task.shift_480p is None or not is_small else task.shift_480p,
        "sampler": task.solver,
        "negative_prompt": task.negative_prompt,
        "cfg_scale": task.cfg_scale,
        # one scale is meant for both experts
        "cfg_scale_low_noise": None if _is_there(values["cfg_scale"]) else task.cfg_scale_low_noise,
    }
    if values["preset"] is not None:
        from diffsynth.pipelines.presets import preset_values

        for replaced in preset_values({"preset": values["preset"]}):
            values_of_task.pop(replaced, None)
    if _is_there(values["max_area"]) or "src_video" in given:
        return values_of_task
    if _is_there(values["input_image"]) and not (values["width"] or values["height"]):
        return {**values_of_task, "max_area": size[0] * size[1]}
    for side, pixels in zip(("width", "height"), size, strict=True):
        if pixels % task.grid:
            low = pixels // task.grid * task.grid
            near = f"{low} and {low + task.grid}" if low else str(task.grid)
            raise ArgumentError(
                f"--size {size[0]}*{size[1]}: --task {name} makes multiples of {task.grid} pixels, near "
                f"{side} {pixels} {near}."
            )
    return {**values_of_task, "width": size[0], "height": size[1]}


def _told_size(given: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """``--size`` beside our own flags: without a task it is width and height, or an area for a picture."""
    if "size" not in given:
        return {}
    width, height = parse_size(given["size"])
    if replaced := [name for name in ("height", "width", "max_area") if _is_there(kept[name])]:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in replaced)
        raise ArgumentError(f"--size replaces {names}; give one or the other.")
    if "task" in given:
        return {}
    if _is_there(kept["input_image"]):
        return {"max_area": width * height}
    return {"width": width, "height": height}


def _is_there(value: object) -> bool:
    return value is not None and value not in ([], ())


def switch(text: str) -> bool:
    """A truth value as generate.py writes it."""
    try:
        return SWITCHES[text.strip().lower()]
    except KeyError:
        raise ArgumentError(f"--offload_model is {text!r}; give True or False.") from None


# ---- the source video of VACE ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """How a source video is used."""

    height: int  # pixels
    width: int
    frames: tuple[int, ...]  # which of the source's


def fit_source(num_frames: int, height: int, width: int, *, area: int, max_frames: int = 81) -> Fit:
    """Return size and frames of the video that VACE makes of a source video.

    The whole source is gone through evenly, in its own proportions, with as many pixels as ``max_frames`` of
    ``area`` have; it is never enlarged.

    Args:
        num_frames: of the source.
        height: of the source, in pixels.
        width: of the source.
        area: pixels of a frame.
        max_frames: of this area.

    Raises:
        ArgumentError: for a source without one square of 16 pixels.

    Source: Wan2.1 ``wan/utils/vace_processor.py`` VaceVideoProcessor with keep_last.
    """
    room = area // 256 * ((max_frames - 1) // 4 + 1)  # squares of 16 x 16 pixels in all latent frames
    squares = min(area // 256, (height // 16) * (width // 16))
    if not squares:
        raise ArgumentError(f"--src_video is {width}x{height}; give a video of 16x16 pixels or more.")
    latents = min((num_frames - 1) // 4 + 1, room // squares)
    squares = min(squares, room // latents)
    rows = max(1, round(math.sqrt(squares * height / width)))
    count = (latents - 1) * 4 + 1
    # The last is the middle of the last frame's time; frame i is there from i to i + 1.
    times = (k * (num_frames - 0.5) / (count - 1) for k in range(1, count))
    frames = (0, *(max(0, math.ceil(moment) - 1) for moment in times))
    return Fit(height=16 * rows, width=16 * max(1, squares // rows), frames=frames)


# Facts of files -> what a warning says of a video that has them: its frames are taken as they are stored.
ODD = {
    "is_anamorphic": "pixels are not square, and are taken as if they were, so that it gets wider or "
    "narrower: convert it first, by ffmpeg -i IN -vf 'scale=iw*sar:ih,setsar=1' OUT",
    "is_hdr": "levels are HDR (PQ or HLG), and are taken as they are, which is pale and flat: convert it to "
    "SDR first, by ffmpeg's zscale and tonemap",
    "is_interlaced": "frames are interlaced: what moves has combs at its edges. Deinterlace it first, "
    "by ffmpeg -i IN -vf bwdif OUT",
}


def opened_video(path: Path) -> VideoData:
    """A video file, or a folder of pictures; what of a file is not as players show it is said."""
    if path.is_dir():
        return VideoData(image_folder=path)
    video = VideoData(path)
    facts = probe_media(path)
    for name in (name for name in ODD if getattr(facts, name)):
        logger.warning("%s: its %s.", path, ODD[name])
    return video


class Picked(Sequence["Frame"]):
    """Some frames of a video, each read when it is asked for."""

    def __init__(self, video: VideoData, frames: Sequence[int], source: Path) -> None:
        self._video, self.frames = video, tuple(frames)
        self.source = source  # of the video

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, item: int) -> Frame: ...
    @overload
    def __getitem__(self, item: slice) -> list[Frame]: ...
    def __getitem__(self, item: int | slice) -> Frame | list[Frame]:
        if isinstance(item, slice):
            return [self._video[frame] for frame in self.frames[item]]
        return self._video[self.frames[item]]


def _of_source(task: Task, given: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Size, length and frames, as `fit_source` tells."""
    if own := [name for name in ("height", "width", "num_frames", "fit") if _is_there(kept[name])]:
        raise ArgumentError(
            f"--src_video tells size and length, so that --{own[0].replace('_', '-')} is not read; give "
            "--size and --frame_num as their limits, or --vace-video in place of --src_video."
        )
    size = parse_size(given["size"]) if "size" in given else (task.width, task.height)
    video, mask = (
        None if path is None else opened_video(path) for path in (given["src_video"], given.get("src_mask"))
    )
    assert video is not None
    length = len(video) if mask is None else min(len(video), len(mask))
    max_frames = given.get("frame_num", task.num_frames)
    fit = fit_source(length, *video.shape(), area=size[0] * size[1], max_frames=max_frames)
    told = {"height": fit.height, "width": fit.width, "num_frames": len(fit.frames)}
    return {
        **told, "vace_video": Picked(video, fit.frames, given["src_video"]),
        "vace_video_mask": None if mask is None else Picked(mask, fit.frames, given["src_mask"]),
    }  # fmt: skip

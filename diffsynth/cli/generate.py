"""``diffsynth generate``: everything that can be known to fail is checked before a model is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth.cli.flags import FLAGS, TORCH_NAMES
from diffsynth.cli.origins import inputs_told
from diffsynth.cli.output import (
    BYTES_PER_PIXEL,
    ENCODER_OPTIONS,
    FPS,
    Output,
    check_output,
    is_picture,
    log_to_stderr,
    write_video,
)
from diffsynth.cli.preview import NUM_SEEDS, line_for_refining, save_sheet, sheet_beside, smaller
from diffsynth.cli.text_on_cpu import text_on_cpu
from diffsynth.errors import ArgumentError, CheckpointNotFoundError, DiffSynthError, MissingModelError
from diffsynth.video import VideoData, check_output_path, load_image

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger("diffsynth")

USUAL_OUT = Path("video.mp4")
TINY_NOTE = (
    "No --model given: the tiny Wan that ships with diffsynth draws small moving shapes. "
    "A real one: --model FOLDER, or --model Wan-AI/Wan2.1-T2V-1.3B --download (17 GB)."
)
TILE_FLAGS = ("tiled", "tile_size", "tile_stride")
_USUAL_PIXELS = 480 * 832
_LATENT_BYTES_PER_PIXEL = 0.25  # 16 channels of float32 for 4 x 8 x 8 pixels


def run_generate(prompt: str | None, given: Mapping[str, object]) -> None:
    """Make what was asked for, write it, and say what was written.

    Args:
        prompt: what to show; None: ``given`` tells it.
        given: the values of `FLAGS` and `TASK_FLAGS`, without ``debug``.

    Raises:
        DiffSynthError: what was wrong, before a model is loaded where it can be known.
        typer.BadParameter: without a prompt, or with two.
    """
    from diffsynth.cli.generate_task import with_task
    from diffsynth.cli.tasks import REFINE_TASK

    values: dict[str, Any] = {
        name: value.value if isinstance(value, Enum) else value for name, value in given.items()
    }
    with log_to_stderr(bool(values["quiet"])):
        if values["task"] == REFINE_TASK:
            from diffsynth.cli.refine import refined_by_task

            make(*refined_by_task(values["prompt_text"] if prompt is None else prompt, values))
            return
        text = _one_prompt(prompt, values["prompt_text"])
        make(text, with_task(text, values))


def make(prompt: str, values: Mapping[str, Any]) -> None:
    """Load, generate, write, and say what was written.

    Args:
        prompt: what to show.
        values: of `FLAGS`, with ``offload`` (networks rest on the host) and ``t5_cpu`` beside them.

    Raises:
        DiffSynthError: what was wrong, before a model is loaded where it can be known.
    """
    from diffsynth.pipelines.saved_latents import latents_kept

    arguments = _call_arguments(prompt, values)
    output = _check(values, arguments)
    loras = _loras(values)
    started = time.monotonic()
    pipe = _load(values)
    for path, strength in loras:
        pipe.load_lora(path, strength)
    inputs = inputs_told(values)
    more: dict[str, object] = {"inputs": inputs} if inputs else {}  # settings that the call does not tell
    if values["preview"]:
        arguments, more["preview_of"] = smaller(arguments, pipe.parts)
    if values["t5_cpu"]:
        arguments, texts = text_on_cpu(pipe, arguments)
        more.update(texts)
    latents = _generate(pipe, arguments)
    tiles: dict[str, Any] = {name: arguments[name] for name in TILE_FLAGS if name in arguments}
    settings = _settings(pipe, output, loras, more)
    # All of them before the first is decoded: what was computed is safe from here on.
    kept = [_keep(pipe, latents, output, i, each) for i, each in enumerate(settings)]
    for index, (path, file) in enumerate(zip(output.paths, kept, strict=True)):
        with latents_kept(file):
            made = write_video(pipe, latents[index : index + 1], path, output, settings[index], tiles)
        if values["keep_latents"]:
            logger.info("The latents are in %s", file)
        else:
            file.unlink(missing_ok=True)
        seconds = time.monotonic() - started
        typer.echo(f"{made}, seed {settings[index].get('seed')}, {seconds:.1f} s")
    if values["preview"]:
        sheet = save_sheet(output.paths, settings, sheet_beside(_out(values)))
        typer.echo(f"{sheet}; go on with: {line_for_refining(output.paths[0], values)}")


def _one_prompt(unnamed: str | None, named: str | None) -> str:
    if unnamed is not None and named is not None:
        raise typer.BadParameter("The prompt is told twice, with --prompt and without a name; give one.")
    prompt = named if unnamed is None else unnamed
    if prompt is None:
        raise typer.BadParameter("There is no prompt; give one: diffsynth generate 'a cat on the beach'.")
    return prompt


def _out(values: Mapping[str, Any]) -> Path:
    return values["out"] or USUAL_OUT


def _call_arguments(prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `pipe()` is called with: only what was given, files opened."""
    names = [flag.name for flag in FLAGS if flag.is_call]
    arguments = {name: values[name] for name in names if values[name] not in (None, [])}
    for name in ("input_video", "control_video", "vace_video", "vace_video_mask"):
        source = arguments.get(name)
        if isinstance(source, Path):
            arguments[name] = VideoData(image_folder=source) if source.is_dir() else VideoData(source)
    for name in ("input_image", "end_image", "reference_image"):
        if name in arguments:
            arguments[name] = load_image(arguments[name])
    if "vace_reference_image" in arguments:
        arguments["vace_reference_image"] = [load_image(path) for path in arguments["vace_reference_image"]]
    if values["quiet"]:
        arguments["progress_bar_cmd"] = _no_progress
    return {"prompt": prompt, **arguments}


def _check(values: Mapping[str, Any], arguments: dict[str, Any]) -> Output:
    """Make sure that videos and latents can be written; a name that ends in .png asks for one frame.

    Args:
        values: of all flags.
        arguments: of `pipe()`; gets ``num_frames=1`` for a picture.

    Raises:
        OutputPathError: when a path cannot be written.
        ArgumentError: for several frames in a picture, or options that the encoder cannot take.
    """
    from diffsynth.pipelines.saved_latents import latents_beside

    out = _out(values)
    if values["preview"]:
        arguments.setdefault("num_videos_per_prompt", NUM_SEEDS)
        check_output_path(sheet_beside(out), suffixes=(".png",))
    count = max(1, int(arguments.get("num_videos_per_prompt", 1)))
    if is_picture(out) and arguments.setdefault("num_frames", 1) != 1:
        raise ArgumentError(
            f"--out {out} is a picture and --num-frames is {arguments['num_frames']}; "
            "leave --num-frames out, or name a video, such as --out video.mp4."
        )
    pixels = arguments.get("height", 0) * arguments.get("width", 0) or _USUAL_PIXELS
    num_bytes = pixels * arguments.get("num_frames", 81) * count * (BYTES_PER_PIXEL + _LATENT_BYTES_PER_PIXEL)
    options = {name: values[name] for name in ENCODER_OPTIONS if values[name] is not None}
    output = check_output(out, count, fps=values["fps"], options=options, need_bytes=max(0, int(num_bytes)))
    for path in output.paths:
        check_output_path(latents_beside(path, output.run_id), suffixes=(".safetensors",))
    return output


def _loras(values: Mapping[str, Any]) -> list[tuple[Path, float]]:
    """File and strength of each ``--lora``; raises for a file that is not there."""
    found = []
    for given in values["lora"]:
        path, strength = Path(given), 1.0
        name, _, number = given.rpartition(":")
        if not path.exists() and name and (told := _number(number)) is not None:
            path, strength = Path(name), told
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"--lora {given}: {path} is no file; give FILE, or FILE:STRENGTH, such as "
                "style.safetensors:0.8."
            )
        found.append((path, strength))
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


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

    from diffsynth.models.download import local_paths
    from diffsynth.models.model_manager import ModelManager, resolved_device
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    chosen: Any = paths or str(tiny_folder())
    dtype: str = values["dtype"] or ("bfloat16" if paths else "float32")
    limits = _limits(values)
    device = resolved_device(values["device"] or (None if paths else "cpu"))
    # Within limits networks rest on the host and come to the device for their turn.
    rests = bool(limits) or values["offload"] or values["t5_cpu"]
    manager = ModelManager(getattr(torch, TORCH_NAMES.get(dtype, dtype)), "cpu" if rests else device)
    manager.load_models(local_paths(chosen[0] if len(paths) == 1 else chosen, download=values["download"]))
    pipe = WanVideoPipeline.from_model_manager(
        manager,
        device=device,
        dit=values["dit"] or None,
        tokenizer_path=values["tokenizer_path"],
        precision=values["precision"] or "official",
    )
    if limits:
        pipe.enable_vram_management(**limits)
    if values["attention"] or values["fp8_compute"]:
        pipe.choose_kernels(values["attention"], values["fp8_compute"])
    if pipe.parts.vae is None:
        raise MissingModelError(
            f"--model holds no VAE; give its file too: --model DIT --model {pipe.parts.vae_file}."
        )
    return pipe


def _limits(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `enable_vram_management` is given; empty without a limit."""
    vram = values["vram"]
    if vram not in (None, "auto"):
        try:
            vram = float(vram)
        except ValueError:
            raise ArgumentError(f"--vram is {vram!r}; give GiB, such as 12, or auto.") from None
    limits = {
        "num_persistent_param_in_dit": values["num_persistent"],
        "vram_limit": vram,
        "ram_limit": values["ram"],
    }
    return {name: value for name, value in limits.items() if value is not None}


def _generate(pipe: WanVideoPipeline, arguments: Mapping[str, Any]) -> Tensor:
    """Latents (B, C, T, h, w)."""
    import torch

    try:
        latents = pipe(**arguments, output_type="latent")
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise DiffSynthError(
            f"The GPU's memory does not suffice: {reason}. Ask for a smaller --height, --width or "
            "--num-frames, add --tiled, or use a smaller model."
        ) from error
    assert isinstance(latents, torch.Tensor)
    return latents


def _settings(
    pipe: WanVideoPipeline,
    output: Output,
    loras: Sequence[tuple[Path, float]],
    more: Mapping[str, object],
) -> list[dict[str, object]]:
    """What goes into each file: enough to make it again, and no path of this machine."""
    from diffsynth.pipelines.request import usual_values
    from diffsynth.pipelines.saved_latents import provenance

    settings = provenance(pipe.parts, pipe.precision, {**pipe.last_settings, **more})
    for name in ("num_videos_per_prompt", "strict", "output_type"):  # of the run, not of this video
        settings.pop(name, None)
    if loras:
        settings["loras"] = {path.name: strength for path, strength in loras}
    if not output.is_picture:
        settings["fps"] = output.fps or float(str(usual_values(pipe.parts).get("fps", FPS)))
    seed = settings.get("seed")
    counted = range(len(output.paths))
    return [{**settings, **({"seed": seed + i} if isinstance(seed, int) else {})} for i in counted]


def _keep(
    pipe: WanVideoPipeline, latents: Tensor, output: Output, index: int, settings: Mapping[str, object]
) -> Path:
    from diffsynth.pipelines.saved_latents import latents_beside, save_latents

    path = output.paths[index]
    how = {"name": path.name, **output.options}
    return save_latents(
        latents_beside(path, output.run_id), latents[index : index + 1], pipe.parts, settings, how
    )


def _no_progress(steps: Iterable[Any]) -> Iterable[Any]:
    return steps

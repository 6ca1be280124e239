"""``diffsynth generate``: everything that can be known to fail is checked before a model is loaded."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth.cli.flags import FLAGS, TORCH_NAMES, Flag
from diffsynth.cli.generate_task import opened_video
from diffsynth.cli.naming import Names, naming_of
from diffsynth.cli.origins import inputs_told
from diffsynth.cli.output import (
    ENCODER_OPTIONS,
    FPS,
    Output,
    Size,
    check_output,
    check_size,
    is_picture,
    log_to_stderr,
    write_video,
)
from diffsynth.cli.preview import NUM_SEEDS, line_for_refining, save_sheet, smaller
from diffsynth.cli.resume import (
    OF_THE_RUN,
    check_save_every,
    flags_for,
    forget_steps,
    resumed,
    steps_arguments,
)
from diffsynth.cli.text_on_cpu import text_on_cpu
from diffsynth.conditioning.argument import MEDIA, TILES
from diffsynth.errors import (
    ArgumentError,
    CheckpointNotFoundError,
    DiffSynthError,
    MissingModelError,
    ResumeError,
    UnusedInputError,
)
from diffsynth.pipelines.options import call_arguments
from diffsynth.video import load_image

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.pipelines.saved_latents import KeptLatents
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger("diffsynth")

USUAL_OUT = Path("video.mp4")
TINY_NOTE = (
    "No --model given: the tiny Wan that ships with diffsynth draws small moving shapes. "
    "A real one: --model FOLDER, or --model Wan-AI/Wan2.1-T2V-1.3B --download (17 GB)."
)
LATENT_BYTES_PER_PIXEL = 0.25  # 16 channels of float32 for 4 x 8 x 8 pixels
MODEL_FLAGS = ("model", "dit", "tokenizer_path")


def run_generate(prompt: str | None, given: Mapping[str, object]) -> None:
    """Make what was asked for, write it, and say what was written.

    Args:
        prompt: what to show; None: ``given`` tells it.
        given: the values of `FLAGS` and `TASK_FLAGS`, without ``debug``.

    Raises:
        DiffSynthError: what was wrong, before a model is loaded where it can be known.
        typer.BadParameter: without a prompt, or with two.
    """
    from diffsynth.cli.generate_task import with_example, with_task
    from diffsynth.cli.tasks import REFINE_TASK

    values: dict[str, Any] = {
        name: value.value if isinstance(value, Enum) else value for name, value in given.items()
    }
    with log_to_stderr(bool(values["quiet"])):
        if values["resume"] is not None:
            make(*resumed(prompt, values))
            return
        if values["task"] == REFINE_TASK:
            from diffsynth.cli.refine import refined_by_task

            make(*refined_by_task(values["prompt_text"] if prompt is None else prompt, values))
            return
        text, values = with_example(_one_prompt(prompt, values["prompt_text"]), values)
        if text is None:
            made = " For a video that diffsynth made: diffsynth refine --from FILE." * bool(
                values["input_video"]
            )
            raise typer.BadParameter(
                f"There is no prompt; give one: diffsynth generate 'a cat on the beach'.{made}"
            )
        make(text, with_task(text, values))


def make(prompt: str, values: Mapping[str, Any]) -> None:
    """Load, generate, write, and say what was written.

    Args:
        prompt: what to show.
        values: of `FLAGS`, and those of `BESIDE_FLAGS`.

    Raises:
        DiffSynthError: what was wrong, before a model is loaded where it can be known.
    """
    arguments = _call_arguments(prompt, values)
    _check_values(values, arguments)
    loras = _loras(values)
    started = time.monotonic()
    with _check(values, arguments, [path for path, _ in loras]) as output:
        pipe = _load(values)
        for path, strength in loras:
            pipe.load_lora(path, strength)
        arguments = _without_unread(pipe, arguments, values["from_file"])
        inputs = inputs_told(values)
        more: dict[str, object] = {"inputs": inputs} if inputs else {}  # what the call does not tell
        if values["preview"]:
            arguments, more["preview_of"] = smaller(arguments, pipe.parts)
        _check_size(pipe, arguments, output)
        if values["t5_cpu"]:
            arguments, texts = text_on_cpu(pipe, arguments)
            more.update(texts)
        latents = _generate(pipe, {**arguments, **steps_arguments(prompt, values, output.names)})
        settings = _settings(pipe, output, loras, more)
        paths = _write(pipe, latents, output, settings, values, started)
        if output.names.sheet is not None:
            sheet = save_sheet(paths, settings, output.names.sheet, overwrite=output.names.overwrites)
            typer.echo(f"{sheet}; go on with: {line_for_refining(paths[0], values)}")
            forget_steps(values, output.names)


def _write(
    pipe: WanVideoPipeline,
    latents: Tensor,
    output: Output,
    settings: Sequence[Mapping[str, object]],
    values: Mapping[str, Any],
    started: float,
) -> list[Path]:
    """Decode each video into its file, say what was made, and return where they are."""
    from diffsynth.pipelines.saved_latents import latents_kept

    names = [name for name, each in call_arguments().items() if each.group == TILES]
    tiles = {name: values[name] for name in names if values[name] is not None}
    # All of them before the first is decoded: what was computed is safe from here on.
    kept = [_keep(pipe, latents, output, i, values["device"], each) for i, each in enumerate(settings)]
    if output.names.sheet is None:  # which no latents make
        forget_steps(values, output.names)
    paths = []
    for index, each in enumerate(settings):
        with latents_kept(*kept[index:]):
            path, made = write_video(
                pipe, latents[index : index + 1], output.paths[index], output, each, tiles
            )
        paths.append(path)
        if values["keep_latents"]:
            logger.info("The latents are in %s", kept[index].path)
        else:
            kept[index].path.unlink(missing_ok=True)
        typer.echo(f"{made}, seed {each.get('seed')}, {time.monotonic() - started:.1f} s")
    return paths


def _one_prompt(unnamed: str | None, named: str | None) -> str | None:
    if unnamed is not None and named is not None:
        raise typer.BadParameter("The prompt is told twice, with --prompt and without a name; give one.")
    return named if unnamed is None else unnamed


def _call_arguments(prompt: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `pipe()` is called with: only what was given, files opened."""
    given = {flag: values[flag.name] for flag in FLAGS if flag.is_call}
    arguments = {flag.name: _opened(flag, value) for flag, value in given.items() if value not in (None, [])}
    if values["quiet"]:
        arguments["progress_bar_cmd"] = _no_progress
    return {"prompt": prompt, **arguments}


def _opened(flag: Flag, value: Any) -> Any:
    """What a flag names, as `pipe()` reads it; a video of one picture may be that picture."""
    assert flag.argument is not None
    kind = flag.argument.kind
    if kind == "pictures":
        return [load_image(path) for path in value]
    if kind == "picture":
        return load_image(value)
    if kind == "video" and isinstance(value, Path):
        return [load_image(value)] if is_picture(value) else opened_video(value)
    return value


def _check(values: Mapping[str, Any], arguments: dict[str, Any], loras: Sequence[Path]) -> Output:
    """Make sure that videos can be written, and claim their names; one that ends in .png asks for one frame.

    Args:
        values: of all flags.
        arguments: of `pipe()`; gets ``num_frames=1`` for a picture.
        loras: files that are read.

    Raises:
        OutputPathError: when a path cannot be written.
        ArgumentError: for several frames in a picture, or what the encoder or the file cannot take.
    """
    from diffsynth.pipelines.argument_checks import check_numbers, check_seed
    from diffsynth.pipelines.saved_latents import earlier_beside

    check_save_every(values["save_every"])
    check_numbers(arguments)
    check_seed(arguments.get("seed"), arguments.get("num_videos_per_prompt", 1))
    out = values["out"] or USUAL_OUT
    if values["preview"]:
        arguments.setdefault("num_videos_per_prompt", NUM_SEEDS)
    if is_picture(out) and arguments.setdefault("num_frames", 1) != 1:
        raise ArgumentError(
            f"--out {out} is a picture and --num-frames is {arguments['num_frames']}; "
            "leave --num-frames out, or name a video, such as --out video.mp4."
        )
    names = Names(
        out=out,
        naming=naming_of(
            is_named=values["out"] is not None and not values["has_default_out"],
            overwrite=values["overwrite"],
        ),
        num_videos=max(1, int(arguments.get("num_videos_per_prompt", 1))),
        resumed=None if values["resumed"] is None else values["resumed"].names,
        has_sheet=values["preview"],
        inputs=[*_read_files(values), *loras],
    )
    texts: dict[str, object] = {
        name: arguments[name] for name in ("prompt", "negative_prompt") if name in arguments
    }
    options = {name: values[name] for name in ENCODER_OPTIONS if values[name] is not None}
    output = check_output(names, fps=values["fps"], options=options, texts=texts, size=_asked_size(arguments))
    for path in output.paths:
        for file, command in earlier_beside(path, output.run_id):
            logger.info("%s is there, of an earlier run with this name; to go on from it: %s", file, command)
    return output


def _asked_size(arguments: Mapping[str, Any]) -> Size | None:
    """What is told before the model is there; wrong numbers are told by the pipeline."""
    height, width, num_frames = (arguments.get(name, 1) for name in ("height", "width", "num_frames"))
    if min(height, width, num_frames) < 1 or not {"height", "width"} <= arguments.keys():
        return None
    return Size(
        height=height + height % 2, width=width + width % 2, num_frames=num_frames,
        latent_bytes=int(height * width * num_frames * LATENT_BYTES_PER_PIXEL),
    )  # fmt: skip


def _read_files(values: Mapping[str, Any]) -> Iterator[str | Path]:
    """What the command reads, beside LoRAs: no output may be one of these files."""
    media = [name for name, each in call_arguments().items() if each.kind in MEDIA]
    for name in (*MODEL_FLAGS, *media, "read_files"):
        given = values[name]
        for each in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(file := getattr(each, "source", each), (str, Path)):
                yield file
    if values["resumed"] is not None:
        yield values["resumed"].steps


def _check_size(pipe: WanVideoPipeline, arguments: Mapping[str, Any], output: Output) -> None:
    """Make sure that the videos can be written, now that the model tells what was not asked for."""
    from diffsynth.pipelines.presets import preset_values
    from diffsynth.pipelines.request import usual_values

    assert pipe.parts.vae is not None
    usual = {**usual_values(pipe.parts), **preset_values(arguments), **arguments}
    height, width, num_frames = (max(1, int(usual[name])) for name in ("height", "width", "num_frames"))
    if usual.get("max_area") is not None:
        height = width = math.isqrt(max(1, usual["max_area"])) // 16 * 16 or 16
    vae = pipe.parts.vae
    num_latents = (num_frames - 1) // vae.temporal_stride + 1
    area = height * width // vae.spatial_stride**2
    size = Size(
        height=height + height % 2, width=width + width % 2, num_frames=num_frames,
        latent_bytes=4 * vae.z_dim * num_latents * area,
    )  # fmt: skip
    check_size(output, size, float(str(usual.get("fps", FPS))))


def _check_values(values: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Numbers that cannot be and flags that nobody reads, before a path is looked at or a model is loaded.

    Raises:
        ArgumentError: for a number.
        UnusedInputError: for a flag.
    """
    from diffsynth.pipelines.argument_checks import check_numbers, check_seed

    check_numbers(arguments)
    check_seed(arguments.get("seed"), arguments.get("num_videos_per_prompt", 1))
    for name in ("dit", "download") if not values["model"] else ():
        if values[name]:
            raise UnusedInputError(f"--{name} says something of --model, which was not given; leave it out.")
    if values["tiled"] is False and (values["tile_size"] or values["tile_stride"]):
        raise UnusedInputError("--no-tiled was given, so that --tile-size and --tile-stride are not read.")


def _without_unread(
    pipe: WanVideoPipeline, arguments: dict[str, Any], from_file: Sequence[str]
) -> dict[str, Any]:
    """Leave out what a file or task told and this model does not read; the caller's own is refused later."""
    from diffsynth.pipelines.request import usual_values
    from diffsynth.pipelines.unread import why_unread

    why = why_unread(arguments, {**usual_values(pipe.parts), **arguments}, pipe.parts)
    for name in [name for name in why if name in from_file]:
        logger.info("%s=%s is left out: it is for two experts, and one is loaded.", name, arguments[name])
        arguments = {key: value for key, value in arguments.items() if key != name}
    return arguments


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
    from diffsynth.pipelines.experts import refuse_one_expert
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    chosen: Any = paths or str(tiny_folder())
    dtype: str = values["dtype"] or ("bfloat16" if paths else "float32")
    limits = _limits(values)
    asked = values["device"]
    device = resolved_device(asked if asked is not None or paths else "cpu")
    if device.type == "meta":
        raise ArgumentError("--device is meta, which computes nothing; give cpu or cuda.")
    # Within limits networks rest on the host and come to the device for their turn.
    rests = bool(limits) or values["offload"] or values["t5_cpu"]
    manager = ModelManager(getattr(torch, TORCH_NAMES.get(dtype, dtype)), "cpu" if rests else device)
    files = local_paths(chosen[0] if len(paths) == 1 else chosen, download=values["download"])
    if not values["single_expert"]:
        refuse_one_expert(files, values["dit"])
    manager.load_models(files)
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
            f"--model holds no VAE; give its file too: --model DIT --model {pipe.parts.facts.vae_file}."
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

    from diffsynth.ops.out_of_memory import is_out_of_memory

    try:
        latents = pipe(**arguments, output_type="latent")
    except ResumeError as error:
        raise DiffSynthError(
            f"{error.path} is of another run: {flags_for(error.differences)}. Give what that run had, or "
            "begin anew without --resume."
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
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
    for name in OF_THE_RUN:
        settings.pop(name, None)
    if loras:
        settings["loras"] = {path.name: strength for path, strength in loras}
    if not output.is_picture:
        settings["fps"] = output.fps or float(str(usual_values(pipe.parts).get("fps", FPS)))
    seed = settings.get("seed")
    counted = range(len(output.paths))
    return [{**settings, **({"seed": seed + i} if isinstance(seed, int) else {})} for i in counted]


def _keep(
    pipe: WanVideoPipeline,
    latents: Tensor,
    output: Output,
    index: int,
    device: str | None,
    settings: Mapping[str, object],
) -> KeptLatents:
    from diffsynth.pipelines.saved_latents import keep_latents, latents_beside

    path = output.paths[index]
    more = [] if device is None else ["--device", device]
    if output.names.overwrites and path.exists():
        more.append("--overwrite")
    return keep_latents(
        latents_beside(path, output.run_id), latents[index : index + 1], pipe.parts, settings, out=path,
        options=output.options, decode_options=more,
    )  # fmt: skip


def _no_progress(steps: Iterable[Any]) -> Iterable[Any]:
    return steps

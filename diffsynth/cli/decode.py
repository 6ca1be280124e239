"""``diffsynth decode``: makes the video of latents whose run did not come to its end."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffsynth.cli.flags import TORCH_NAMES
from diffsynth.cli.naming import Names, naming_of
from diffsynth.cli.output import (
    ENCODER_OPTIONS,
    FPS,
    Output,
    Size,
    check_output,
    is_picture,
    log_to_stderr,
    write_video,
)
from diffsynth.errors import ArgumentError, MissingModelError

if TYPE_CHECKING:
    from diffsynth.pipelines.saved_latents import KeptLatents, SavedLatents
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger("diffsynth")

VAE_NAME = "wan_video_vae"


def run_decode(path: Path, given: Mapping[str, object]) -> None:
    """Decode a file of latents and say what was written. What is not given is as the run had it.

    The latents stay where they are.

    Args:
        path: of the latents.
        given: the values of `DECODE_FLAGS`, without ``debug``.

    Raises:
        DiffSynthError: what was wrong, before the VAE is loaded where it can be known.
    """
    from diffsynth.pipelines.saved_latents import latents_kept, read_latents

    values = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    with log_to_stderr(bool(values["quiet"])):
        saved = read_latents(path)
        with _check(path, saved, values) as output:
            started = time.monotonic()
            pipe = _load(path, saved, values)
            for index, target in enumerate(output.paths):
                settings = _settings(saved, output, index)
                row = saved.latents[index : index + 1]
                with latents_kept(_kept(path, saved, pipe, values)):
                    _, made = write_video(pipe, row, target, output, settings, _tiles(saved, values))
                seed = f", seed {settings['seed']}" if "seed" in settings else ""
                typer.echo(f"{made}{seed}, {time.monotonic() - started:.1f} s")


def _kept(path: Path, saved: SavedLatents, pipe: WanVideoPipeline, values: Mapping[str, Any]) -> KeptLatents:
    """What the same command is, where this one fails."""
    from diffsynth.pipelines.saved_latents import KeptLatents, keep_latents

    assert pipe.parts.vae is not None
    again = {name: values[name] for name in ("out", "vae", "device") if values[name] is not None}
    options = [word for name, value in again.items() for word in (f"--{name}", str(value))]
    dtype = str(next(pipe.parts.vae.parameters()).dtype).removeprefix("torch.")
    return KeptLatents(
        path=path, out=path, vae_dtype=dtype,
        save_again=lambda: keep_latents(path, saved.latents, pipe.parts, saved.settings).path,
        options=(*options, *(["--overwrite"] if values["overwrite"] else [])),
    )  # fmt: skip


def _check(path: Path, saved: SavedLatents, values: Mapping[str, Any]) -> Output:
    from diffsynth.models.wan.dit_config import VAE22_CHANNELS

    count, channels, num_latents, height, width = saved.latents.shape
    name = re.sub(r"(\.[0-9a-f]{8})?(\.latents)?\.safetensors$", "", path.name) + ".mp4"
    out: Path = values["out"] or path.with_name(Path(str(saved.output.get("name") or name)).name)
    num_frames = 4 * (num_latents - 1) + 1
    if is_picture(out) and num_frames > 1:
        raise ArgumentError(
            f"--out {out} is a picture and {path} holds {num_frames} frames; name a video, such as "
            "--out video.mp4."
        )
    options = {name: values[name] for name in ENCODER_OPTIONS if values[name] is not None}
    asked_before = Path(str(saved.output.get("name", ""))).suffix.lower()
    if not options and out.suffix.lower() == asked_before:
        options = {name: saved.output[name] for name in ENCODER_OPTIONS if name in saved.output}
    stride = 16 if channels == VAE22_CHANNELS else 8
    return check_output(
        Names(
            out=out, naming=naming_of(is_named=values["out"] is not None, overwrite=values["overwrite"]),
            num_videos=count, inputs=[path, *([values["vae"]] if values["vae"] else [])],
        ),
        fps=values["fps"], options=options, texts={},
        size=Size(height=height * stride, width=width * stride, num_frames=num_frames),
    )  # fmt: skip


def _load(path: Path, saved: SavedLatents, values: Mapping[str, Any]) -> WanVideoPipeline:
    vae: str | Path | None = values["vae"] or saved.vae
    if vae is None:
        raise MissingModelError(
            f"{path} does not tell where the VAE is, or it is not there any more; give --vae FILE, such as "
            "Wan2.1_VAE.pth."
        )
    import torch

    from diffsynth.models.model_manager import ModelManager
    from diffsynth.pipelines.wan_video import WanVideoPipeline

    name = str(values["dtype"] or saved.vae_dtype)
    dtype = getattr(torch, TORCH_NAMES.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32  # exact, where nothing is told
    manager = ModelManager(torch_dtype=dtype, device=values["device"])
    manager.load_models([vae], model_names=[VAE_NAME])
    is_v1 = saved.settings.get("precision") == "v1"
    return WanVideoPipeline.from_model_manager(manager, precision="v1" if is_v1 else "official")


def _tiles(saved: SavedLatents, values: Mapping[str, Any]) -> dict[str, Any]:
    """As asked now, else as asked then; a ``--no-tiled`` that failed is not repeated."""
    names = ("tiled", "tile_size", "tile_stride")
    if any(values[name] is not None for name in names):
        return {name: values[name] for name in names}
    if saved.settings.get("tiled") is not True:
        return {}
    then: dict[str, Any] = {"tiled": True}
    for name in names[1:]:
        pair = saved.settings.get(name)
        if isinstance(pair, list):
            then[name] = tuple(pair)
    return then


def _settings(saved: SavedLatents, output: Output, index: int) -> dict[str, object]:
    """What goes into the file: as the run would have written it."""
    settings = {name: value for name, value in saved.settings.items() if name != "output_type"}
    seed = settings.get("seed")
    if isinstance(seed, int):
        settings["seed"] = seed + index
    if not output.is_picture:
        settings["fps"] = output.fps or settings.get("fps", FPS)
    return settings

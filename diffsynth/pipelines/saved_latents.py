"""Latents on the disk: what a render that dies at its last step leaves behind, and how it goes on from there.

The file is safetensors with one tensor, ``latents`` (B, C, T, h, w) float32. Its metadata hold ``settings``
(JSON: what the call resolved to), ``vae`` (the file of the VAE), ``vae_dtype`` and ``output`` (JSON: how the
video was to be written).
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth import __version__
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.named import TINY, name_of
from diffsynth.checkpoints.saving import save_tensors
from diffsynth.errors import ArgumentError
from diffsynth.tiny import tiny_folder
from diffsynth.video.paths import check_output_path

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.pipelines.components import PipelineComponents

logger = logging.getLogger("diffsynth")

SUFFIX = ".latents.safetensors"
STEPS_SUFFIX = ".steps.safetensors"
HEADER_BYTES = 1 << 16  # of the file, at most: prompts and settings


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedLatents:
    """What `read_latents` found."""

    latents: Tensor  # (B, C, T, h, w)
    settings: Mapping[str, object]  # empty when another program wrote the file
    vae: Path | None  # None: not told, or not there any more
    vae_dtype: str | None  # "bfloat16"
    output: Mapping[str, object]  # name and encoder's options of the video; empty when not told


def latents_beside(path: Path, run_id: str) -> Path:
    """``video.mp4`` -> ``video.1a2b3c4d.latents.safetensors`` in the same folder; no two runs share it."""
    return path.with_name(f"{path.stem}.{run_id}{SUFFIX}")


def steps_beside(path: Path, run_id: str) -> Path:
    """``video.mp4`` -> ``video.1a2b3c4d.steps.safetensors``: what a run keeps between its steps."""
    return path.with_name(f"{path.stem}.{run_id}{STEPS_SUFFIX}")


def check_latents_path(path: str | os.PathLike[str], num_elements: int) -> Path:
    """Make sure that latents of so many elements can be written there, before the work starts.

    Raises:
        ArgumentError: when it is no path.
        OutputPathError: when it cannot be written, does not end in .safetensors, or the disk is full.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"save_latents is {path!r}; give a path such as 'video{SUFFIX}'.")
    return check_output_path(path, need_bytes=4 * num_elements + HEADER_BYTES, suffixes=(".safetensors",))


def provenance(
    parts: PipelineComponents, precision: str, settings: Mapping[str, object]
) -> dict[str, object]:
    """Settings that make a video again: those of the call, and the networks, without paths of this machine.

    Args:
        parts: of the pipeline.
        precision: of the pipeline.
        settings: its ``last_settings``.
    """
    given = {name: value for name, value in settings.items() if value not in ("", None)}
    sources = {part: name_of(source) for part, source in parts.sources.items()}
    return {"diffsynth": __version__, **given, "precision": precision, "models": sources}


def save_latents(
    path: str | os.PathLike[str],
    latents: Tensor,
    parts: PipelineComponents,
    settings: Mapping[str, object],
    output: Mapping[str, object] | None = None,
) -> Path:
    """Write latents so that `read_latents` and ``diffsynth decode`` can go on from them.

    Args:
        path: ends in .safetensors; a file of this name is replaced.
        latents: (B, C, T, h, w).
        parts: of the pipeline that made them; tell which VAE decodes them.
        settings: plain values.
        output: name and encoder's options of the video that is to be made.

    Returns:
        The real path.

    Raises:
        OutputPathError: when the disk refuses; nothing half-written stays.
    """
    target = check_latents_path(path, latents.numel())
    metadata = {"format": "pt", "settings": json.dumps(dict(settings), ensure_ascii=False, default=str)}
    if output is not None:
        metadata["output"] = json.dumps(dict(output), ensure_ascii=False)
    if "vae" in parts.sources:
        metadata["vae"] = _origin(parts.sources["vae"])
    if parts.vae is not None:
        metadata["vae_dtype"] = str(next(parts.vae.parameters()).dtype).removeprefix("torch.")
    # A row of a batch is a view of all of it: the file holds the row alone.
    save_tensors(target, {"latents": latents.float().clone()}, metadata)
    return target


def read_latents(path: str | os.PathLike[str]) -> SavedLatents:
    """Read latents that `save_latents` wrote, or any safetensors with a tensor ``latents`` of five axes.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError: for a file that is absent or cut off.
        ArgumentError: for a file that holds no latents.
    """
    file = Checkpoint.open(Path(path).expanduser())
    shape = file.shapes.get("latents", ())
    if "noisy_latents" in file:
        raise ArgumentError(
            f"{path} holds the steps of a run that did not come to its end; go on with that run first: "
            f"diffsynth generate --resume {shlex.quote(str(path))}"
        )
    if len(shape) != 5:
        found = (
            f"latents of shape {shape}" if shape else f"{len(file)} tensors ({', '.join([*file.shapes][:3])})"
        )
        raise ArgumentError(
            f"{path} holds {found}, not latents (B, C, T, h, w). Give a file that diffsynth generate or "
            f"pipe(save_latents=...) wrote, such as video{SUFFIX}."
        )
    return SavedLatents(
        latents=file.tensor("latents").clone(),  # not the map: the file may be removed before the end
        settings=_object(file, "settings"),
        vae=_existing(file.metadata.get("vae")),
        vae_dtype=file.metadata.get("vae_dtype"),
        output=_object(file, "output"),
    )


@contextmanager
def latents_kept(path: Path | None) -> Iterator[None]:
    """Say where the latents lie, and which command goes on from them, when what is inside ends early."""
    try:
        yield
    except BaseException:  # Ctrl-C as well
        if path is not None:
            command = f"diffsynth decode {shlex.quote(str(path))}"
            logger.warning(
                "The latents are kept in %s; this command makes the video of them: %s", path, command
            )
        raise


def _origin(source: str) -> str:
    path = Path(source.partition(" (+")[0]).expanduser().resolve()
    return TINY + path.name if path.parent == tiny_folder().resolve() else str(path)


def _existing(origin: str | None) -> Path | None:
    if origin is None:
        return None
    path = tiny_folder() / origin.removeprefix(TINY) if origin.startswith(TINY) else Path(origin)
    return path if path.is_file() else None


def _object(file: Checkpoint, key: str) -> dict[str, object]:
    text = file.metadata.get(key, "{}")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentError(
            f"{file.source}: its {key!r} are no JSON object but {text[:60]!r}; it was changed."
        )
    return found

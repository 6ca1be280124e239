"""Latents on the disk: what a render that dies at its last step leaves behind, and how it goes on from there.

The file is safetensors with one tensor, ``latents`` (B, C, T, h, w) float32. Its metadata hold ``settings``
(JSON: what the call resolved to), ``vae`` (the file of the VAE), ``vae_dtype`` and ``output`` (JSON: how the
video was to be written).
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from diffsynth import __version__
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.named import TINY, name_of
from diffsynth.checkpoints.saving import save_tensors
from diffsynth.errors import ArgumentError, NotFiniteError, OutputPathError
from diffsynth.tiny import tiny_folder
from diffsynth.video.claims import NAME_BYTES, fitting
from diffsynth.video.paths import check_output_path, remove_leftovers, user_cache
from diffsynth.video.settings import is_utf8, pack

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.pipelines.components import PipelineComponents

logger = logging.getLogger("diffsynth")

SUFFIX = ".latents.safetensors"
STEPS_SUFFIX = ".steps.safetensors"
HEADER_BYTES = 1 << 16  # of the file, at most: prompts and settings
_URI = "file://"  # a path whose bytes are not UTF-8


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
    return _beside(path, f".{run_id}{SUFFIX}")


def steps_beside(path: Path, run_id: str) -> Path:
    """``video.mp4`` -> ``video.1a2b3c4d.steps.safetensors``: what a run keeps between its steps."""
    return _beside(path, f".{run_id}{STEPS_SUFFIX}")


def earlier_beside(path: Path, run_id: str) -> list[tuple[Path, str]]:
    """What earlier runs with the name of a video have left beside it, each with the command that goes on.

    Args:
        path: of the video.
        run_id: of the run that asks.
    """
    found = []
    for file in sorted(path.parent.glob(f"{escape(path.stem)}.*.safetensors")):
        id_, _, kind = file.name.removeprefix(f"{path.stem}.").partition(".")
        command = {SUFFIX[1:]: "decode", STEPS_SUFFIX[1:]: "generate --resume"}.get(kind)
        if command is not None and id_ != run_id and re.fullmatch("[0-9a-f]{8}", id_):
            found.append((file, f"diffsynth {command} {shell_word(str(file))}"))
    return found


def _beside(path: Path, ending: str) -> Path:
    """A long name keeps its end, where videos of one run differ."""
    return path.with_name(fitting(path.stem, NAME_BYTES - len(ending)) + ending)


def check_latents_path(path: str | os.PathLike[str], num_elements: int) -> Path:
    """Make sure that latents of so many elements can be written there, before the work starts.

    Raises:
        ArgumentError: when it is no path.
        OutputPathError: when it cannot be written, does not end in .safetensors, or the disk is full.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"save_latents is {path!r}; give a path such as 'video{SUFFIX}'.")
    target = check_output_path(path, need_bytes=4 * num_elements + HEADER_BYTES, suffixes=(".safetensors",))
    remove_leftovers(target.parent)
    return target


def model_files(parts: PipelineComponents) -> Iterator[Path]:
    """The files that the networks and LoRAs of a pipeline were read from; of shards, their folder."""
    for source in (*parts.sources.values(), *parts.loras.sources):
        name, _, shards = source.partition(" (+")
        yield Path(name).parent if shards else Path(name)


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
    *,
    is_private: bool = False,
) -> Path:
    """Write latents so that `read_latents` and ``diffsynth decode`` can go on from them.

    Args:
        path: ends in .safetensors; a file of this name is replaced.
        latents: (B, C, T, h, w).
        parts: of the pipeline that made them; tell which VAE decodes them.
        settings: plain values.
        output: name and encoder's options of the video that is to be made.
        is_private: nobody but its owner can read the file.

    Returns:
        The real path.

    Raises:
        OutputPathError: when the disk refuses; nothing half-written stays.
    """
    target = check_latents_path(path, latents.numel())
    metadata = {"format": "pt", "settings": pack(settings)}
    if output is not None:
        metadata["output"] = pack(output)
    if "vae" in parts.sources:
        metadata["vae"] = _origin(parts.sources["vae"])
    if (dtype := _dtype_of_vae(parts)) is not None:
        metadata["vae_dtype"] = dtype
    # A row of a batch is a view of all of it: the file holds the row alone.
    save_tensors(target, {"latents": latents.float().clone()}, metadata, is_private=is_private)
    return target


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptLatents:
    """Latents that are on the disk until their video is."""

    path: Path
    out: Path  # of the video
    save_again: Callable[[], Path]  # where the file has vanished
    options: tuple[str, ...] = ()  # more of ``diffsynth decode``
    vae_dtype: str | None = None

    def command(self, error: BaseException | None = None) -> str:
        """The line that makes the video of them, where ``error`` has ended the run."""
        words = ["diffsynth", "decode", str(self.path)]
        if self.path.parent != self.out.parent:
            words += ["--out", str(self.out)]
        words += self.options
        if isinstance(error, NotFiniteError) and self.vae_dtype != "float32":
            words += ["--dtype", "float32"]
        return " ".join(map(shell_word, words))


def keep_latents(
    path: Path,
    latents: Tensor,
    parts: PipelineComponents,
    settings: Mapping[str, object],
    *,
    out: Path | None = None,
    options: Mapping[str, object] | None = None,
    decode_options: Sequence[str] = (),
) -> KeptLatents:
    """As `save_latents`; what the disk refuses goes to the user's cache, or else to the temporary folder.

    Args:
        path: of the file.
        latents: (B, C, T, h, w).
        parts: of the pipeline.
        settings: plain values.
        out: the video that is to be made of them; None: beside them.
        options: of its encoder.
        decode_options: that ``diffsynth decode`` needs as well.

    Raises:
        OutputPathError: when no disk takes them.
    """
    about = None if out is None else {"name": out.name, **(options or {})}

    def save() -> Path:
        try:
            return save_latents(path, latents, parts, settings, about)
        except OutputPathError as error:
            refused = error
        for place in _fallback_folders():
            with suppress(OSError):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
                other = place / f"{secrets.token_hex(2)}-{path.name}"
                found = save_latents(other, latents, parts, settings, about, is_private=True)
                logger.warning("%s", refused)
                return found
        raise OutputPathError(f"{refused} No other folder takes the latents either.") from refused

    video = path.with_name(path.name.removesuffix(".safetensors").removesuffix(".latents") + ".mp4")
    kept = KeptLatents(
        path=save(), out=_absolute(video if out is None else out), save_again=save,
        options=tuple(decode_options), vae_dtype=_dtype_of_vae(parts),
    )  # fmt: skip
    if kept.path.parent != _absolute(path).parent:
        more = f"; this command makes the video of them: {kept.command()}" if out is None else "."
        logger.warning("The latents are in %s instead%s", kept.path, more)
    return kept


def _absolute(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


def _fallback_folders() -> Iterator[Path]:
    with suppress(RuntimeError):  # a user without a home
        yield user_cache() / "latents"
    with suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix="diffsynth-"))  # 0700, and a name that nobody can know before


def _dtype_of_vae(parts: PipelineComponents) -> str | None:
    if parts.vae is None:
        return None
    return str(next(parts.vae.parameters()).dtype).removeprefix("torch.")


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
def latents_kept(*kept: KeptLatents) -> Iterator[None]:
    """Say where latents lie, and which commands go on from them, when what is inside ends early."""
    try:
        yield
    except BaseException as error:  # Ctrl-C as well
        for each in kept:
            there = each
            if not each.path.is_file():  # removed with its folder
                try:
                    there = replace(each, path=each.save_again())
                except OSError as refused:
                    logger.warning("The latents are lost: %s was removed. %s", each.path, refused)
                    continue
            logger.warning(
                "The latents are kept in %s; this command makes the video of them: %s",
                there.path,
                there.command(error),
            )
        raise


def shell_word(text: str) -> str:
    """A word as a shell takes it, also bytes that are not UTF-8."""
    if is_utf8(text):
        return shlex.quote(text)
    escaped = (chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{''.join(escaped)}'"


def _origin(source: str) -> str:
    path = Path(source.partition(" (+")[0]).expanduser().resolve()
    if path.parent == tiny_folder().resolve():
        return TINY + path.name
    return str(path) if is_utf8(str(path)) else path.as_uri()


def _existing(origin: str | None) -> Path | None:
    if origin is None:
        return None
    if origin.startswith(TINY):
        path = tiny_folder() / origin.removeprefix(TINY)
    elif origin.startswith(_URI):
        path = Path(os.fsdecode(unquote_to_bytes(origin.removeprefix(_URI))))
    else:
        path = Path(origin)
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

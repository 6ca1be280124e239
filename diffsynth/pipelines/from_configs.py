"""From the `ModelConfig`s of a script to loaded networks, and what their placements mean here.

DiffSynth-Studio 2.x tells of every model where its weights are while it is not needed (offload), while its
phase lasts (onload), where there is room (preparing) and while it computes. Here a plan decides that from a
limit, call by call; what is left of the eight fields is where weights rest, in which dtype, and the limit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from diffsynth.announce import announce
from diffsynth.checkpoints.files import PathLike
from diffsynth.conditioning.tokenizer import find_tokenizer
from diffsynth.errors import ArgumentError, TokenizerNotFoundError, UnusedInputError
from diffsynth.models.model_manager import ModelManager, resolved_device
from diffsynth.ops.fp8 import FP8, dtype_name
from diffsynth.pipelines.memory import MemoryLimits
from diffsynth.pipelines.model_config import ModelConfig, locate

logger = logging.getLogger("diffsynth")

DISK = "disk"  # 2.x's word, for a device and for a dtype
TOKENIZER = ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B", origin_file_pattern="google/umt5-xxl/")


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What the placements of all configs come to."""

    device: torch.device  # where networks compute
    dtype: torch.dtype | None  # of weights and intermediate results
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    fp8_compute: bool = False  # multiply in fp8


def load_configs(
    configs: Sequence[ModelConfig],
    *,
    torch_dtype: torch.dtype | None,
    device: str | torch.device | None,
    tokenizer_config: ModelConfig | None,
    tokenizer_path: PathLike | None,
    redirect_common_files: bool,
    vram_limit: float | Literal["auto"] | None,
    download: bool,
) -> tuple[ModelManager, Arrangement, PathLike | None]:
    """Find the files of all configs, then load them; arguments as in `WanVideoPipeline.from_pretrained`.

    Returns:
        The networks, what their placements come to, and where the tokenizer is, if not beside its encoder.

    Raises:
        CheckpointNotFoundError: when files are not here; says how to fetch them.
        ArgumentError: for a config that asks for what is not here.
        As `ModelManager.load_models`.
    """
    given = [configs] if isinstance(configs, ModelConfig) else list(configs)
    if not given:
        raise ArgumentError("model_configs is empty; give ModelConfig(...) for each model.")
    for config in given:
        _check(config)
    arrangement = arrange(given, torch_dtype, device, vram_limit)
    files = locate(given, allow=download, redirect=redirect_common_files)
    manager = ModelManager(torch_dtype=arrangement.dtype, device=arrangement.device)

    def storage(pair: tuple[ModelConfig, object]) -> tuple[torch.dtype | None, torch.device]:
        return _stored(pair[0], torch_dtype), _rests(pair[0], arrangement.device)

    for (dtype, place), pairs in groupby(zip(given, files, strict=True), storage):
        paths: list[str | list[str]] = []
        for config, some in pairs:
            # A list that the script gave holds the shards of one model; what a pattern finds may be several.
            paths += [some] if isinstance(some, str) or config.path is not None else some
        manager.load_models(paths, device=place, torch_dtype=dtype)
    if tokenizer_path is None:
        tokenizer_path = _tokenizer(manager, given, tokenizer_config, download=download)
    return manager, arrangement, tokenizer_path


def arrange(
    configs: Sequence[ModelConfig],
    torch_dtype: torch.dtype | None,
    device: str | torch.device | None,
    vram_limit: float | Literal["auto"] | None,
) -> Arrangement:
    """Read the placements of all configs as one arrangement, and say in a line what it is.

    Raises:
        ArgumentError: when they ask for what no arrangement here can be.
    """
    devices = {_device(c.computation_device) for c in configs if c.computation_device is not None}
    if device is None and len(devices) == 1:
        device = next(iter(devices))
    place = resolved_device(None if device is None else _device(device))
    if any(_away(one, place) for one in devices):
        raise ArgumentError(
            f"computation_device is {', '.join(sorted(map(str, devices)))} and the pipeline's device is "
            f"{place}: all networks of a pipeline compute on one device. Give device= alone."
        )
    stored = {_stored(c, torch_dtype) for c in configs}
    dtype, is_fp8 = _computing(configs, stored)
    limits = _limits(configs, place, vram_limit)
    found = Arrangement(device=place, dtype=dtype or torch_dtype, limits=limits, fp8_compute=is_fp8)
    if told := _told(configs, found, stored):
        announce("%s", told)
    return found


def _computing(
    configs: Sequence[ModelConfig], stored: set[torch.dtype | None]
) -> tuple[torch.dtype | None, bool]:
    """The dtype that networks are to compute in (None: not told), and whether products are to be in fp8."""
    told = {c.computation_dtype for c in configs if isinstance(c.computation_dtype, torch.dtype)}
    plain = sorted(told - {FP8}, key=str)
    names = " and ".join(dtype_name(dtype) for dtype in plain)
    if len(plain) > 1:
        raise ArgumentError(f"computation_dtype is {names}; give one dtype for all networks.")
    others = [dtype for dtype in stored if dtype not in (None, FP8, *plain)]
    if plain and others:
        kept = " and ".join(dtype_name(dtype) for dtype in others if dtype is not None)
        raise ArgumentError(
            f"computation_dtype is {names} and weights are kept in {kept}: networks compute in the dtype of "
            "their weights, or in bfloat16 for fp8. Give both the same."
        )
    return (plain[0] if plain else None), FP8 in told


def _limits(
    configs: Sequence[ModelConfig], place: torch.device, vram_limit: float | Literal["auto"] | None
) -> MemoryLimits:
    """The limit; without one, streaming of all blocks where weights are to stay away from the device."""
    if vram_limit == 0:
        return MemoryLimits(num_persistent_param_in_dit=0)  # "as little as possible"
    if vram_limit is not None:
        return MemoryLimits(vram_limit=vram_limit)
    streams = any(
        config.preparing_device is not None and _away(config.preparing_device, place) for config in configs
    )
    return MemoryLimits(num_persistent_param_in_dit=0) if streams else MemoryLimits()


def _told(configs: Sequence[ModelConfig], found: Arrangement, stored: set[torch.dtype | None]) -> str:
    """One line of what the placements came to; empty when none was given."""
    names = ("offload", "onload", "preparing", "computation")
    given = [f"{n}_{kind}" for n in names for kind in ("device", "dtype")]
    if not any(getattr(config, name) is not None for config in configs for name in given):
        return ""
    places = {_rests(config, found.device) for config in configs}
    dtypes = ", ".join(sorted("the file's dtype" if d is None else dtype_name(d) for d in stored))
    from_disk = any(DISK in (c.offload_device, c.offload_dtype) for c in configs)
    rests = " and ".join(sorted("the host" if one.type == "cpu" else str(one) for one in places))
    how = ", mapped from their files" if from_disk else ""
    limits = found.limits
    if limits.vram_limit is not None:
        way = f"blocks that do not fit into vram_limit={limits.vram_limit:g} GiB are streamed"
    elif limits.num_persistent_param_in_dit == 0:
        way = "every block of the DiT is streamed"
    else:
        way = "each network comes for its phase as a whole"
    return f"Weights rest on {rests}{how}, in {dtypes}; they compute on {found.device}, and {way}."


def _check(config: object) -> None:
    if not isinstance(config, ModelConfig):
        raise ArgumentError(f"model_configs holds {config!r}; give ModelConfig(...) for each model.")
    if config.quantize is not None or config.state_dict is not None or config.clear_parameters:
        name = next(n for n in ("quantize", "state_dict", "clear_parameters") if getattr(config, n))
        raise ArgumentError(
            f"ModelConfig({name}=...) is not in this version; weights are kept in fp8 with "
            "offload_dtype=torch.float8_e4m3fn."
        )
    for name in ("offload_dtype", "onload_dtype", "preparing_dtype", "computation_dtype"):
        value = getattr(config, name)
        is_disk = value == DISK and name != "computation_dtype"
        if value is not None and not is_disk and not isinstance(value, torch.dtype):
            raise ArgumentError(f"ModelConfig({name}={value!r}): give a torch.dtype, or 'disk' for rest.")


def _stored(config: ModelConfig, usual: torch.dtype | None) -> torch.dtype | None:
    """In which dtype weights rest; of the disk they are read in the next one that is told."""
    told = (config.offload_dtype, config.onload_dtype, config.preparing_dtype)
    return next((dtype for dtype in told if isinstance(dtype, torch.dtype)), usual)


def _rests(config: ModelConfig, place: torch.device) -> torch.device:
    told = [config.offload_device, config.onload_device]
    on_disk = DISK in (config.offload_dtype, config.onload_dtype)
    is_away = on_disk or any(one is not None and _away(one, place) for one in told)
    return torch.device("cpu") if is_away else place


def _away(device: str | torch.device, place: torch.device) -> bool:
    """Whether this is not the device that computes: the host, the disk, or another GPU."""
    if device == DISK:
        return True
    one = _device(device)
    same_number = None in (one.index, place.index) or one.index == place.index
    return one.type != place.type or not same_number


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"A device is {device!r}; give 'cuda', 'cuda:1', 'cpu', or 'disk'.") from error


def _tokenizer(
    manager: ModelManager, configs: Sequence[ModelConfig], told: ModelConfig | None, *, download: bool
) -> str | None:
    """Where the tokenizer is, if not beside the text encoder: where it was told, or where 1.1.8 puts it."""
    entry = next((e for e in manager.loaded if e.name == "wan_video_text_encoder"), None)
    if told is not None and not isinstance(told, ModelConfig):
        raise ArgumentError(f"tokenizer_config is {told!r}; give ModelConfig(...), or tokenizer_path=PATH.")
    if entry is None:
        return None
    usual = ModelConfig(
        model_id=TOKENIZER.model_id, origin_file_pattern=TOKENIZER.origin_file_pattern,
        local_model_path=next((c.local_model_path for c in configs if c.model_id), None),
    )  # fmt: skip
    is_beside = _lies_beside(entry.paths[0]) or entry.match.attachments is not None
    for config in (told, None if is_beside else usual):
        found = None if config is None else config.found()
        if found is not None:
            return found if isinstance(found, str) else found[0]
    if is_beside:
        if told is not None:
            logger.warning("The tokenizer of tokenizer_config is not here: that beside the encoder is read.")
        return None
    [path] = locate([told or usual], allow=download)
    return path if isinstance(path, str) else path[0]


def _lies_beside(text_encoder: Path) -> bool:
    try:
        find_tokenizer(text_encoder)
    except TokenizerNotFoundError:
        return False
    return True


def refuse_audio(config: object) -> None:
    """Raise for the processor of speech, which nothing here reads."""
    if config is not None:
        raise UnusedInputError(
            "audio_processor_config was given, but no loaded model reads it: it is of Wan2.2-S2V-14B (speech "
            "to video), which this version does not run."
        )

"""Loads any checkpoint of the Wan family: the file says what it is, the manager builds it and keeps it.

Nothing is built before every path has been looked at, so that a wrong path costs no time and no memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor, nn

from diffsynth.announce import announce
from diffsynth.checkpoints.architecture import Match
from diffsynth.checkpoints.build import build, load_class
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.files import PathLike
from diffsynth.checkpoints.hints import Role
from diffsynth.errors import ArgumentError, UnknownCheckpointError
from diffsynth.lora.matching import LoRAReport
from diffsynth.models.lora_experts import Expert, PerExpert
from diffsynth.models.loras import LoRAs, Mode, Weight
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.ops.devices import known_device
from diffsynth.ops.fp8 import FP8, dtype_name
from diffsynth.ops.fp8_policy import fp8_summary

logger = logging.getLogger("diffsynth")

Paths = PathLike | Sequence[PathLike | Sequence[PathLike]]
FilePath = PathLike | Sequence[PathLike] | None
Device = str | torch.device
# Encoders that other variants need: in a folder of a whole repository they are passed over until they can be
# built.
OPTIONAL_IN_FOLDERS = ("wan_video_image_encoder", "wan_video_audio_encoder")


class _DefaultDevice(str):
    """The default of ``device``: reads "cuda" as in v1, and means "cuda if there is one"."""


CUDA_IF_THERE = _DefaultDevice("cuda")


@dataclass(frozen=True)
class LoadedModel:
    """One network that a manager holds, and where it came from."""

    name: str
    model: nn.Module
    paths: tuple[Path, ...]
    match: Match


class ModelManager:
    """Holds the networks of a pipeline.

    Args:
        torch_dtype: dtype of the weights loaded from now on; None keeps each file's own.
            ``torch.float8_e4m3fn`` keeps the Linear layers of a network's blocks in fp8, with a scale per row
            (of the DiT, without its first and last block), and everything else in bfloat16.
        device: where weights are put; None, and the default where there is no GPU: "cuda" if there is one,
            else "cpu".
        model_id_list: ids on the hubs (``"Wan-AI/Wan2.1-T2V-1.3B"``), downloaded now and loaded.
        file_path_list: loaded now, see `load_models`.
        downloading_priority: where ``model_id_list`` is looked for, in this order.

    ``manager.torch_dtype`` is the dtype in which networks compute: bfloat16 for fp8 weights.
    """

    def __init__(
        self,
        torch_dtype: torch.dtype | None = torch.bfloat16,
        device: Device | None = CUDA_IF_THERE,
        model_id_list: Sequence[str] | None = None,
        file_path_list: Paths | None = None,
        downloading_priority: Sequence[str] = ("ModelScope", "HuggingFace"),
    ) -> None:
        self.storage_dtype = _storage_dtype(torch_dtype)
        self.torch_dtype = torch.bfloat16 if self.storage_dtype == FP8 else self.storage_dtype
        self.device = resolved_device(device)
        self.loaded: list[LoadedModel] = []
        self.loras = LoRAs(self.loaded)
        if model_id_list:
            from diffsynth.models.download import download_models

            self.load_models(download_models(model_id_list, downloading_priority))
        if file_path_list:
            self.load_models(file_path_list)

    @property
    def model(self) -> list[nn.Module]:
        """The networks, in the order in which they were loaded."""
        return [entry.model for entry in self.loaded]

    @property
    def model_path(self) -> list[str | list[str]]:
        """Where each network came from: its file, or the list of its shards."""
        return [_plain_paths(entry.paths) for entry in self.loaded]

    @property
    def model_name(self) -> list[str]:
        """The name of each network, as `fetch_model` takes it."""
        return [entry.name for entry in self.loaded]

    def load_model(
        self,
        file_path: PathLike | Sequence[PathLike],
        model_names: Sequence[str] | None = None,
        device: Device | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> None:
        """Load a file, a folder, or the list of the shards of one model; arguments as in `load_models`."""
        paths = [file_path] if isinstance(file_path, (str, Path)) else [list(file_path)]
        self.load_models(paths, model_names, device, torch_dtype)

    def load_models(
        self,
        file_path_list: Paths,
        model_names: Sequence[str] | None = None,
        device: Device | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> ModelManager:
        """Load every network found in these paths, and return the manager.

        Args:
            file_path_list: files, folders, globs and lists of shards in any mix; one path alone is fine, and
                the shards of a model may also be given one by one.
            model_names: load only networks of these names; None loads all.
            device: where their weights are put; None: the manager's device.
            torch_dtype: dtype of their weights, fp8 as in the manager; None: the manager's dtype.

        Raises:
            CheckpointNotFoundError, MissingShardError, CorruptCheckpointError, UnsafeCheckpointError: for
                files that cannot be read.
            UnknownCheckpointError: for a file that is no known network; says which is nearest.
            UnsupportedModelError: for a network that is known but not built by this version.
            ConfigurationError, IncompleteCheckpointError: for a network whose sizes or tensors are
                incomplete.
        """
        place = self.device if device is None else resolved_device(device)
        dtype = self.storage_dtype if torch_dtype is None else _storage_dtype(torch_dtype)
        matches = _wanted(_recognised(Checkpoint.open_all(file_path_list)), model_names)
        for match in matches:
            match.require_config()
            load_class(match)
        for match in matches:
            self._add(match, build(match, dtype, place), dtype)
        return self

    @overload
    def fetch_model(
        self, model_name: str, file_path: FilePath = None, require_model_path: Literal[False] = False
    ) -> nn.Module | None: ...

    @overload
    def fetch_model(
        self, model_name: str, file_path: FilePath = None, *, require_model_path: Literal[True]
    ) -> tuple[nn.Module, str | list[str]] | None: ...

    def fetch_model(
        self, model_name: str, file_path: FilePath = None, require_model_path: bool = False
    ) -> nn.Module | tuple[nn.Module, str | list[str]] | None:
        """Return the first network of this name, or None if there is none.

        Args:
            model_name: "wan_video_dit", "wan_video_vae", ...
            file_path: only a network that came from this file (or one of these shards).
            require_model_path: return (network, path) instead.
        """
        wanted = None
        if file_path is not None:
            given = [file_path] if isinstance(file_path, (str, Path)) else file_path
            wanted = {Path(path).expanduser().resolve() for path in given}
        found = [
            entry
            for entry in self.loaded
            if entry.name == model_name
            and (wanted is None or wanted & {path.resolve() for path in entry.paths})
        ]
        if not found:
            loaded = ", ".join(self.model_name) or "none"
            logger.info(
                "No %s is loaded%s (loaded: %s).",
                model_name,
                f" from {file_path}" if file_path else "",
                loaded,
            )
            return None
        if len(found) > 1:
            logger.info(
                "%d networks are %s; the first is used: %s.", len(found), model_name, found[0].paths[0]
            )
        first = found[0]
        return (first.model, _plain_paths(first.paths)) if require_model_path else first.model

    def load_lora(
        self,
        file_path: PathLike | Sequence[PathLike] = "",
        lora_alpha: float | PerExpert = 1.0,
        name: str | None = None,
        mode: Mode = "fuse",
        network: str | None = None,
        *,
        expert: Expert | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> list[LoRAReport]:
        """Use a LoRA, of any dialect, on the loaded networks; the log says what fitted and what did not.

        Args:
            file_path: one file, or a list of files that all have the same strength. Of two files for two
                experts (``style_high_noise.safetensors``, ``..._HIGH.safetensors``) what their names have in
                common is enough: ``style.safetensors``.
            lora_alpha: strength; 1 is as trained. The file's own alpha / rank is applied besides. For a pair
                it may be one for each: ``{"high": 0.8, "low": 1.0}``.
            name: for the other methods; None: the file's name without its ending, numbered when it is loaded
                once more, which adds to it. A pair answers to what its names have in common too.
            mode: "fuse" changes the weights; "attach" keeps factors beside them, at full precision also
                beside fp8, and lets the strength follow a schedule.
            network: the name of a network, as in `fetch_model`, or what ``expert`` takes; None: all that it
                fits.
            expert: "high" or "low" for one of two experts, whatever the file's name says; "both" for a file
                and its twin, each on its own expert, and for a file that is meant for both; None: told by the
                file's name, else both.
            state_dict: its tensors by name, in place of a file.

        Raises:
            LoRAError: when nothing fits, for a DiT of another size, or a file that is no LoRA.
            ArgumentError: for a name that is taken, or a strength that is no number.
        """
        return self.loras.load(file_path, lora_alpha, name, mode, network, expert, state_dict=state_dict)

    def set_lora(self, name: str, weight: Weight | Mapping[Role, Weight]) -> None:
        """Change a LoRA's strength: a number, or, for an attached one, a list with one for each step.

        For a pair it may be one for each expert: ``{"high": [1.0, 0.5], "low": 1.0}``. The list for one
        expert has as many strengths as the call has steps, or as its expert has.
        """
        self.loras.set(name, weight)

    def disable_lora(self, name: str | None = None) -> None:
        """Let a LoRA (None: every one) change nothing until `set_lora`."""
        self.loras.disable(name)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA (None: every one) away; the networks' weights are what they were, bit by bit."""
        self.loras.unload(name)

    def to(self, device: Device) -> None:
        """Move every network to ``device``."""
        for entry in self.loaded:
            entry.model.to(resolved_device(device))

    def _add(self, match: Match, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.loaded.append(LoadedModel(match.name, model, match.checkpoint.paths, match))
        tensors = [*model.parameters(), *model.buffers()]
        if all(tensor.is_meta for tensor in tensors):  # an outline: nothing was loaded
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        dtypes = sorted({dtype_name(t.dtype) for t in model.parameters() if t.is_floating_point()})
        amount = f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
        announce("Loaded %s: %s, %s, from %s", match.needs, "/".join(dtypes), amount, match.checkpoint.source)
        if dtype == FP8:
            summary = fp8_summary(model) or "no layers that keep well in fp8; its weights are bfloat16"
            logger.info("%s: %s", match.name, summary)
        for sentence in match.assumed:
            logger.info("%s: %s", match.name, sentence)
        if match.left_over:
            logger.warning(
                "%s: %d tensors belong to no known network and were not read: %s%s",
                match.checkpoint.source,
                len(match.left_over),
                ", ".join(match.left_over[:3]),
                " ..." if len(match.left_over) > 3 else "",
            )


def _plain_paths(paths: tuple[Path, ...]) -> str | list[str]:
    return str(paths[0]) if len(paths) == 1 else [str(path) for path in paths]


def _storage_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype == FP8:
        return dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(
            f"torch_dtype is {dtype!r}; give torch.bfloat16, torch.float16, torch.float32 or "
            "torch.float8_e4m3fn, or None."
        )
    if dtype.itemsize == 1:
        raise ArgumentError(
            f"torch_dtype is {dtype}; of the fp8 formats weights are kept in torch.float8_e4m3fn, which is "
            "the most precise. Files in other fp8 formats load too: their weights are rounded anew."
        )
    return dtype


def resolved_device(device: Device | None) -> torch.device:
    """The device that is meant: None is a GPU if there is one; one that is not there is an ArgumentError."""
    if device is None or isinstance(device, _DefaultDevice):
        has_cuda = torch.cuda.is_available()
        chosen = torch.device("cuda" if has_cuda else "cpu")
        logger.info("device: %s (%s)", chosen, "a GPU was found" if has_cuda else "no GPU was found")
        return chosen
    return known_device(device)


def _recognised(checkpoints: Sequence[Checkpoint]) -> list[Match]:
    """Detect all networks; files that are unknown alone but complete each other are put together."""
    found: dict[int, list[Match]] = {}
    unknown: dict[int, UnknownCheckpointError] = {}
    for i, checkpoint in enumerate(checkpoints):
        try:
            found[i] = _usable(checkpoint, detect(checkpoint, ARCHITECTURES))
        except UnknownCheckpointError as error:
            unknown[i] = error
    for i, matches in _put_together([(i, checkpoints[i]) for i in unknown]).items():
        found[i] = matches
    for i, reason in unknown.items():
        if i in found:
            continue
        if not (checkpoints[i].from_folder and any(found.values())):
            raise reason
        logger.warning("Passed over: %s", reason)
    return [match for i in sorted(found) for match in found[i]]


def _put_together(parts: list[tuple[int, Checkpoint]]) -> dict[int, list[Match]]:
    """Files of one folder that are no model alone may be the parts of one, under names that do not say so."""
    together: dict[int, list[Match]] = {}
    for folder in {checkpoint.paths[0].parent for _, checkpoint in parts}:
        inside = [(i, checkpoint) for i, checkpoint in parts if checkpoint.paths[0].parent == folder]
        names = [name for _, checkpoint in inside for name in checkpoint.shapes]
        if len(inside) < 2 or len(names) != len(set(names)):
            continue
        merged = inside[0][1]
        for _, checkpoint in inside[1:]:
            merged = merged.merged(checkpoint)
        try:
            together[inside[0][0]] = _usable(merged, detect(merged, ARCHITECTURES))
        except UnknownCheckpointError:
            continue
        together.update({i: [] for i, _ in inside[1:]})
    return together


def _usable(checkpoint: Checkpoint, matches: list[Match]) -> list[Match]:
    """Without the encoders that a folder holds for variants which cannot be built yet."""
    usable = []
    for match in matches:
        if checkpoint.from_folder and match.architecture.module is None and match.name in OPTIONAL_IN_FOLDERS:
            logger.warning(
                "Passed over: %s holds %s, which this version does not build. Inputs that need it cannot be "
                "used.",
                checkpoint.source,
                match.needs,
            )
        else:
            usable.append(match)
    return usable


def _wanted(matches: list[Match], model_names: Sequence[str] | None) -> list[Match]:
    if model_names is None:
        return matches
    names = [model_names] if isinstance(model_names, str) else list(model_names)
    present = {match.name for match in matches}
    absent = [name for name in names if name not in present]
    if absent:
        raise ArgumentError(
            f"model_names asks for {', '.join(absent)}; these paths hold "
            f"{', '.join(sorted(present)) or 'no network'}."
        )
    for match in matches:
        if match.name not in names:
            logger.warning("Not loaded, because model_names does not name it: %s", match.needs)
    return [match for match in matches if match.name in names]

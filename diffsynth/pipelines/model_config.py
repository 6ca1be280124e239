"""One model of a pipeline as DiffSynth-Studio's scripts name it: a path, or an id and a pattern of files.

There a model that is named by id is downloaded unasked. Here nothing reaches the network unasked: files that
lie where such a download would have put them are used, and where they are missing an error says the command
that fetches them and the switches that allow it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.checkpoints.files import SUFFIXES, PathLike, group_files
from diffsynth.errors import ArgumentError, CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    import torch

    Device = str | torch.device
    DType = torch.dtype | str  # "disk" is a word of DiffSynth-Studio 2.x

FOLDER_VARIABLE = "DIFFSYNTH_MODEL_BASE_PATH"
SKIP_VARIABLE = "DIFFSYNTH_SKIP_DOWNLOAD"
SOURCE_VARIABLE = "DIFFSYNTH_DOWNLOAD_SOURCE"
SITES = {"modelscope": "ModelScope", "huggingface": "HuggingFace"}
_CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
_T2V, _I2V = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-I2V-14B-480P"
# Files that many repositories hold alike, and where 1.1.8 and 2.x keep the one copy that they download.
COMMON_FILES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "models_t5_umt5-xxl-enc-bf16.pth": (
        (_T2V, "models_t5_umt5-xxl-enc-bf16.pth"),
        (_CONVERTED, "models_t5_umt5-xxl-enc-bf16.safetensors"),
    ),
    "Wan2.1_VAE.pth": ((_T2V, "Wan2.1_VAE.pth"), (_CONVERTED, "Wan2.1_VAE.safetensors")),
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": (
        (_I2V, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
        (_CONVERTED, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"),
    ),
    "Wan2.2_VAE.pth": ((_CONVERTED, "Wan2.2_VAE.safetensors"),),
}


@dataclass
class ModelConfig:
    """Where a model's files are and how its weights rest; the fields of DiffSynth-Studio 1.1.8 and 2.x."""

    path: PathLike | Sequence[PathLike] | None = None  # a file, a folder, or the list of one model's shards
    model_id: str | None = None  # of a hub; its files lie in <local_model_path>/<model_id>
    origin_file_pattern: str | Sequence[str] | None = None  # inside of it; None or "": the whole folder
    download_source: str | None = None  # "modelscope" or "huggingface"
    _: KW_ONLY
    download_resource: str | None = None  # 1.1.8's word for the same
    local_model_path: PathLike | None = None  # None: DIFFSYNTH_MODEL_BASE_PATH, else ./models
    skip_download: bool | None = None  # False allows the download; None: as DIFFSYNTH_SKIP_DOWNLOAD, else no
    offload_device: Device | None = None  # where weights rest; None: where they compute
    offload_dtype: DType | None = None  # in which they rest
    onload_device: Device | None = None  # of 2.x: while their phase lasts
    onload_dtype: DType | None = None
    preparing_device: Device | None = None  # of 2.x: where there is room
    preparing_dtype: DType | None = None
    computation_device: Device | None = None
    computation_dtype: DType | None = None
    clear_parameters: bool = False  # these three ask for what is not here; only their defaults pass
    state_dict: object | None = None
    quantize: object | None = None

    @property
    def root(self) -> Path:
        """The folder that holds the folders of all ids."""
        return Path(self.local_model_path or os.environ.get(FOLDER_VARIABLE) or "models").expanduser()

    @property
    def patterns(self) -> list[str]:
        """What is looked for inside the id's folder; empty: the folder itself."""
        given = self.origin_file_pattern
        return [one for one in ([given] if isinstance(given, str) else given or ()) if one not in ("", "./")]

    @property
    def may_download(self) -> bool:
        """Whether the user has allowed it."""
        if self.skip_download is not None:
            return not self.skip_download
        value = os.environ.get(SKIP_VARIABLE, "").strip().lower()
        if value not in ("", "true", "false", "1", "0"):
            raise ArgumentError(f"{SKIP_VARIABLE} is {value!r}; give True (never) or False (allowed).")
        return value in ("false", "0")

    @property
    def site(self) -> str | None:
        """The hub that was named; None: whichever has it.

        Raises:
            ArgumentError: for an unknown one.
        """
        given = self.download_source or self.download_resource or os.environ.get(SOURCE_VARIABLE)
        if given is None:
            return None
        if given.lower() not in SITES:
            raise ArgumentError(f"download_source is {given!r}; give 'modelscope' or 'huggingface'.")
        return SITES[given.lower()]

    def reset_local_model_path(self) -> None:
        """Fill in ``local_model_path``."""
        self.local_model_path = str(self.root)

    def found(self) -> str | list[str] | None:
        """The path or paths here; None where there is nothing, or where shards are missing.

        Raises:
            ArgumentError: when neither a path nor an id is given.
        """
        if self.path is not None:
            return str(self.path) if isinstance(self.path, (str, Path)) else [str(p) for p in self.path]
        if not self.model_id:
            raise ArgumentError(
                "ModelConfig names no model; give path=FILE, or model_id=ORGANISATION/REPOSITORY and "
                "origin_file_pattern=FILES."
            )
        for name in (self.model_id, *self.patterns):
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ArgumentError(
                    f"ModelConfig names {name!r}; an id and its files lie inside of local_model_path. For "
                    "files elsewhere give path=."
                )
        folder = self.root / self.model_id
        if not self.patterns:
            return str(folder) if folder.is_dir() and any(folder.iterdir()) else None
        names = [sorted(glob.glob(pattern, root_dir=folder)) for pattern in self.patterns]
        paths = [str(folder / name) for some in names for name in some]
        if not all(names) or not _is_whole(paths):
            return None
        return paths[0] if len(paths) == 1 else paths

    def download_if_necessary(self, use_usp: bool = False) -> None:
        """Fill in ``path``: files that are here, or that may be downloaded.

        Raises:
            CheckpointNotFoundError: when they are not here; says how to fetch them.
        """
        self.path = locate([self], allow=False)[0]

    def command(self) -> str:
        """The line that fetches the files to where they are looked for."""
        names = "".join(f" --include '{pattern}'" for pattern in map(_as_glob, self.patterns))
        folder = self.root / str(self.model_id)
        if self.site == "HuggingFace":
            return f"hf download {self.model_id}{names} --local-dir '{folder}'"
        return f"modelscope download --model {self.model_id}{names} --local_dir '{folder}'"


def locate(configs: Sequence[ModelConfig], *, allow: bool, redirect: bool = False) -> list[str | list[str]]:
    """The files of every config; of those that are missing, all are named at once.

    Args:
        configs: as a script gives them.
        allow: downloads, for all that do not say ``skip_download=True``.
        redirect: files that many repositories hold alike are taken from where another one has put them.

    Raises:
        CheckpointNotFoundError: when files are not here and no download was allowed; says how to fetch them.
        ArgumentError: when a config names nothing.
    """
    found = [_find(config, redirect) for config in configs]
    missing = [config for config, paths in zip(configs, found, strict=True) if paths is None]
    refused = [c for c in missing if not (c.may_download or (allow and c.skip_download is None))]
    if refused:
        raise _not_here(refused)
    return [
        paths if paths is not None else _download(config)
        for config, paths in zip(configs, found, strict=True)
    ]


def _find(config: ModelConfig, redirect: bool) -> str | list[str] | None:
    paths = config.found()
    others = COMMON_FILES.get(str(config.origin_file_pattern), ()) if redirect and config.path is None else ()
    for model_id, name in others if paths is None else ():
        other = ModelConfig(model_id=model_id, origin_file_pattern=name, local_model_path=config.root)
        if paths is None:
            paths = other.found()
    return paths


def _not_here(configs: Sequence[ModelConfig]) -> CheckpointNotFoundError:
    names = ", ".join(
        f"{config.root / str(config.model_id)}/{' '.join(config.patterns)}" for config in configs
    )
    commands = "\n  ".join(config.command() for config in configs)
    never = all(config.skip_download for config in configs)
    switch = (
        "skip_download=True forbids the download"
        if never
        else f"Or allow the download: ModelConfig(skip_download=False), {SKIP_VARIABLE}=False in the "
        "environment, or from_pretrained(download=True)"
    )
    return CheckpointNotFoundError(
        f"{names} {'is' if len(configs) == 1 else 'are'} not here, or not whole, and nothing is downloaded "
        f"unasked. Fetch what is missing:\n  {commands}\n{switch}."
    )


def _download(config: ModelConfig) -> str | list[str]:
    from diffsynth.models.download import download_customized_models, download_models

    sites = [config.site] if config.site else list(SITES.values())
    if not config.patterns:
        return download_models([str(config.model_id)], sites, config.root)[0]
    patterns = [_as_glob(pattern) for pattern in config.patterns]
    folder = config.root / str(config.model_id)
    files = download_customized_models(str(config.model_id), patterns, folder, sites)
    return config.found() or files


def _as_glob(pattern: str) -> str:
    return f"{pattern}*" if pattern.endswith("/") else pattern


def _is_whole(paths: Sequence[str]) -> bool:
    """Whether no shard of these is missing."""
    weights = [path for path in paths if path.endswith(SUFFIXES)]
    try:
        return not weights or bool(group_files(weights))
    except CheckpointError:
        return False

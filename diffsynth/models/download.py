"""Downloads of whole repositories, on request only: loading a path never touches the network."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from diffsynth.checkpoints.files import SUFFIXES
from diffsynth.errors import ArgumentError, CheckpointNotFoundError

logger = logging.getLogger("diffsynth")

SITES = ("ModelScope", "HuggingFace")
_SHOWN = 240  # letters of what a site's client answered
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def looks_like_id(text: str) -> bool:
    """Whether ``text`` has the form ORGANISATION/REPOSITORY and names no file of weights."""
    return _ID.fullmatch(text) is not None and not text.endswith(SUFFIXES)


def folder_of_id(model_id: str, local_dir: str | Path = "models") -> Path:
    """Where a repository is downloaded to."""
    return Path(local_dir) / model_id


def download_models(
    model_id_list: Sequence[str],
    downloading_priority: Sequence[str] = SITES,
    local_dir: str | Path = "models",
) -> list[str]:
    """Download repositories, and return the folder of each: ``<local_dir>/<organisation>/<repository>``.

    Args:
        model_id_list: ids such as ``"Wan-AI/Wan2.1-T2V-1.3B"``.
        downloading_priority: "ModelScope" and "HuggingFace", in the order in which they are tried.
        local_dir: where repositories are kept; files that are complete there are not downloaded again.

    Raises:
        ArgumentError: for something that is no id, or an unknown site.
        CheckpointNotFoundError: when no site has it; says what each answered.
    """
    ids = [model_id_list] if isinstance(model_id_list, str) else list(model_id_list)
    return [
        str(_download(model_id, None, folder_of_id(model_id, local_dir), downloading_priority))
        for model_id in ids
    ]


def download_customized_models(
    model_id: str,
    origin_file_path: str | Sequence[str],
    local_dir: str | Path,
    downloading_priority: Sequence[str] = SITES,
) -> list[str]:
    """Download some files of one repository into ``local_dir``, and return their paths.

    Args:
        model_id: such as ``"Wan-AI/Wan2.1-T2V-1.3B"``.
        origin_file_path: a file of the repository or a pattern ("*.safetensors"), or a list of these.
        local_dir: where they are put, under the path that they have in the repository.
        downloading_priority: "ModelScope" and "HuggingFace", in the order in which they are tried.

    Raises:
        ArgumentError: for something that is no id, or an unknown site.
        CheckpointNotFoundError: when no site has it, or it has no such file.
    """
    patterns = [origin_file_path] if isinstance(origin_file_path, str) else list(origin_file_path)
    folder = _download(model_id, patterns, Path(local_dir), downloading_priority)
    files = sorted({str(file) for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise CheckpointNotFoundError(
            f"{model_id} has no file {', '.join(patterns)}; look at its page on the hub."
        )
    return files


def local_paths(
    path: str | Path | Sequence[str | Path], *, download: bool
) -> str | Path | Sequence[str | Path]:
    """Return where the files of ``path`` are: ``path`` itself, or, for an id, where they were downloaded to.

    Raises:
        ArgumentError: for an id without ``download``: nothing reaches the network unasked.
    """
    if not isinstance(path, str) or Path(path).expanduser().exists() or not looks_like_id(path):
        return path
    if not download:
        raise ArgumentError(
            f"{path!r} is no file or folder here; if it is an id on a hub, allow the download with "
            "download=True (--download on the command line)."
        )
    return download_models([path])


def _download(model_id: str, patterns: list[str] | None, folder: Path, sites: Sequence[str]) -> Path:
    if model_id.count("/") != 1 or not all(model_id.split("/")) or ".." in model_id:
        raise ArgumentError(
            f"{model_id!r} is no id of a repository; give ORGANISATION/REPOSITORY, or a path to load_models."
        )
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise ArgumentError(
            f"downloading_priority is {list(sites)}; give {' and '.join(SITES)} in the order you like."
        )
    answers = []
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    for site in sites:
        try:
            logger.info("Downloading %s from %s into %s", model_id, site, folder)
            return Path(_snapshot(site, model_id, patterns, folder))
        except Exception as error:  # each hub's client has errors of its own; the next site may have it
            answers.append(f"{site}: {_shortened(str(error) or type(error).__name__)}")
    for place in new:  # what the clients made and left empty; the innermost is first
        with suppress(OSError):
            place.rmdir()
    raise CheckpointNotFoundError(f"{model_id} could not be downloaded. " + "; ".join(answers))


def _shortened(answer: str) -> str:
    """What a client said, in one line."""
    text = " ".join(answer.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _snapshot(site: str, model_id: str, patterns: list[str] | None, folder: Path) -> str:
    if site == "ModelScope":
        from modelscope import snapshot_download as from_modelscope

        return str(from_modelscope(model_id, local_dir=str(folder), allow_patterns=patterns))
    from huggingface_hub import snapshot_download as from_huggingface

    return str(from_huggingface(model_id, local_dir=str(folder), allow_patterns=patterns))

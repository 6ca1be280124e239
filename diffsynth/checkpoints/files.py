"""From what a user names (files, folders, globs, lists of shards, in any mix) to the files of each model."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth.checkpoints.hints import SHARD, role_of
from diffsynth.checkpoints.open_file import not_found
from diffsynth.errors import CheckpointNotFoundError, CorruptCheckpointError, MissingShardError

logger = logging.getLogger("diffsynth")

PathLike = str | Path
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# Folders of published repositories that hold networks of the same model. Others (assets, tools, LoRAs) are
# not entered.
PART_FOLDERS = (
    "transformer", "transformer_2", "vae", "text_encoder", "image_encoder", "audio_encoder",
    "high_noise_model", "low_noise_model", "dit", "wan_animate_2", "wav2vec2-large-xlsr-53-english",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileGroup:
    """The files of one model."""

    paths: tuple[Path, ...]
    from_folder: bool = False  # found by looking into a folder, not named by the user


def as_path(path: PathLike) -> Path:
    """Return the path with ``~`` expanded."""
    return Path(path).expanduser()


def group_files(paths: PathLike | Sequence[PathLike | Sequence[PathLike]]) -> list[FileGroup]:
    """Return one group per model, in the order in which the models are first named.

    Args:
        paths: a file, folder, glob or index.json, or a list of these; an inner list holds the shards of one
            model. Shards named ``NAME-0000i-of-0000N`` find each other by folder and name, however they are
            given.

    Raises:
        CheckpointNotFoundError: for a path that does not exist, a glob that finds nothing, a folder without
            weights.
        MissingShardError: when some of N shards are absent; names them.
    """
    items = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not items or "" in items:
        raise CheckpointNotFoundError("No path was given; give a file, a folder, or a list of them.")
    groups: list[FileGroup] = []
    for item in items:
        if isinstance(item, (str, Path)):
            groups.extend(_expand(as_path(item)))
        else:
            groups.append(FileGroup(_inner_list(item)))
    return _join_shards(groups)


def _inner_list(shards: Sequence[PathLike]) -> tuple[Path, ...]:
    files = [file for shard in shards for group in _expand(as_path(shard)) for file in group.paths]
    if not files:
        raise CheckpointNotFoundError("A list of shards is empty; give the files of one model in it.")
    by_folder: dict[object, list[Path]] = {}
    for file in dict.fromkeys(files):
        if (stem := _stem(file)) is not None:
            by_folder.setdefault(stem, []).append(file)
    for shards_found in _across_folders(by_folder).values():
        _check_complete(shards_found)
    return tuple(dict.fromkeys(files))


def _expand(path: Path) -> list[FileGroup]:
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(".index.json") and path.is_file():
        return [FileGroup(_files_of_index(path))]
    if path.is_file():
        return [FileGroup((path,))]
    if glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path)))]
        files = [file for file in found if file.is_file() and file.suffix in SUFFIXES]
        if not files and not any(file.is_dir() for file in found):
            raise CheckpointNotFoundError(
                f"{path} finds no weights ({', '.join(SUFFIXES)}); check the pattern."
            )
        return [FileGroup((file,)) for file in files] + [
            g for file in found if file.is_dir() for g in _folder(file)
        ]
    shard = SHARD.fullmatch(path.name)
    if shard and (others := _siblings(path)):
        _check_complete([*others])
    raise CheckpointNotFoundError(not_found(path))


def _files_of_index(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{index} is no index of shards: it lacks a usable weight_map ({error!r})."
        ) from None
    if not names or not all(isinstance(name, str) and Path(name).name == name and name for name in names):
        raise CorruptCheckpointError(
            f"{index} must name files of its own folder; it names {sorted(map(str, names))[:3]}."
        )
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise MissingShardError(
            f"{index} names {len(names)} shards; {len(missing)} of them "
            f"{'is' if len(missing) == 1 else 'are'} not in {index.parent}: {', '.join(missing)}. Download "
            "the missing files into that folder."
        )
    return tuple(index.parent / name for name in sorted(names))


def _folder(folder: Path) -> list[FileGroup]:
    groups, parts = _weights_in(folder), _parts_of(folder)
    for name in parts:
        groups.extend(_weights_in(folder / name))
    others = (entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name not in parts)
    inside = [entry.name for entry in others if any(file.suffix in SUFFIXES for file in entry.iterdir())]
    if groups and inside:
        logger.warning(
            "%s: weights in %s are not looked at; give those folders by name if they belong to the model.",
            folder,
            ", ".join(inside),
        )
    if not groups:
        hint = (
            f"These folders in it do: {', '.join(inside)}; give one of them."
            if inside
            else "Is it the right folder?"
        )
        raise CheckpointNotFoundError(f"{folder} holds no weights ({', '.join(SUFFIXES)}). {hint}")
    return groups


def _parts_of(folder: Path) -> list[str]:
    index = folder / "model_index.json"
    if not index.is_file():
        return [name for name in PART_FOLDERS if (folder / name).is_dir()]
    try:
        content = json.loads(index.read_text("utf-8"))
        named = [name for name, kind in content.items() if isinstance(kind, list) and any(kind)]
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{index} cannot be read ({error}); download it again.") from None
    return [name for name in PART_FOLDERS if name in named and (folder / name).is_dir()]


def _weights_in(folder: Path) -> list[FileGroup]:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
    if any(file.suffix == ".safetensors" for file in files):
        files = [
            file for file in files if file.suffix != ".bin"
        ]  # transformers' second copy of the same weights
    indexed: dict[Path, tuple[Path, ...]] = {}
    for index in sorted(folder.glob("*.index.json")):
        if index.name.removesuffix(".index.json").endswith(SUFFIXES):
            shards = _files_of_index(index)
            indexed.update({shard: shards for shard in shards if shard in files})
    groups = dict.fromkeys(indexed.get(file, (file,)) for file in files)
    return [FileGroup(paths, from_folder=True) for paths in groups]


def _stem(file: Path) -> tuple[Path, str, str] | None:
    shard = SHARD.fullmatch(file.name)
    return (file.parent, shard["stem"] + shard["rest"], shard["count"]) if shard else None


def _join_shards(groups: Iterable[FileGroup]) -> list[FileGroup]:
    """Put shards that were given one by one together; drop what was named twice."""
    files: dict[object, list[Path]] = {}
    from_folder: dict[object, bool] = {}
    for group in groups:
        stems = {_stem(file) for file in group.paths}
        stem = stems.pop() if len(stems) == 1 else None
        key: object = stem if stem is not None else group.paths
        known = files.setdefault(key, [])
        if stem is None and known:
            known.clear()
        known.extend(file for file in group.paths if file not in known)
        from_folder[key] = from_folder.get(key, True) and group.from_folder
    joined = []
    for key, paths in _across_folders(files).items():
        if _stem(paths[0]) == key:
            _check_complete(paths)
            paths.sort(key=lambda path: path.name)
        joined.append(FileGroup(tuple(paths), from_folder[key]))
    return joined


def _across_folders(groups: Mapping[object, list[Path]]) -> dict[object, list[Path]]:
    """Put shards together that lie in several folders and complete each other.

    A folder that holds all of them was given in part, and folders of two experts hold two models: those are
    left apart.

    Args:
        groups: files by what `_stem` tells of them; those under another key are left as they are.
    """
    alike: dict[tuple[str, str], list[object]] = {}
    for key, paths in groups.items():
        if (stem := _stem(paths[0])) is not None and stem == key:
            alike.setdefault((stem[1], stem[2]), []).append(key)
    joined = dict(groups)
    for (_, count), keys in alike.items():
        files = [file for key in keys for file in groups[key]]
        if len(keys) == 1 or len({_number(file) for file in files}) != len(files) or len(files) != int(count):
            continue
        is_in_one = any(len(_siblings(groups[key][0])) == int(count) for key in keys)
        if not is_in_one and len({role_of((file,), {}) for file in files}) == 1:
            for key in keys:
                del joined[key]
            joined[keys[0]] = files
    return {key: joined[key] for key in groups if key in joined}


def _number(file: Path) -> str:
    shard = SHARD.fullmatch(file.name)
    assert shard is not None
    return shard["number"]


def _siblings(path: Path) -> list[Path]:
    if not path.parent.is_dir():
        return []
    return [file for file in sorted(path.parent.iterdir()) if _stem(file) == _stem(path)]


def _check_complete(files: list[Path]) -> None:
    shard = SHARD.fullmatch(files[0].name)
    assert shard is not None
    count, present = (
        int(shard["count"]),
        {found["number"] for f in files if (found := SHARD.fullmatch(f.name))},
    )
    missing = [n for n in range(1, count + 1) if f"{n:05d}" not in present]
    if not missing:
        return
    names = [f"{shard['stem']}-{n:05d}-of-{count:05d}{shard['rest']}" for n in missing]
    on_disk = [name for name in names if (files[0].parent / name).is_file()]
    mend = (
        "They are in the folder but were not given: give the folder, or all of them."
        if len(on_disk) == len(names)
        else f"Download what is missing into {files[0].parent}."
    )
    raise MissingShardError(
        f"{files[0].parent / shard['stem']} is split into {count} shards; {len(missing)} of {count} missing: "
        f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}. {mend}"
    )

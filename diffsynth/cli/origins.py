"""The model, LoRAs and inputs that a video was made with, as its own settings name them.

What flags name wins. What only the file names is looked for (see `checkpoints.named`); what is not found is
an error with the line to type, and never another model in its place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffsynth.checkpoints.named import MODELS, find_named, is_tiny, places_for, printable, with_shards
from diffsynth.cli.flags import FLAGS, command_line
from diffsynth.conditioning.argument import MEDIA
from diffsynth.errors import AmbiguousModelError, ArgumentError, CheckpointNotFoundError

logger = logging.getLogger("diffsynth")

NO_LORA = "none"  # --lora none: go on without those of the file
# inputs that are files; settings hold no path, so that they have to be given again
_INPUTS = [flag for flag in FLAGS if flag.argument is not None and flag.argument.kind in MEDIA]


def inputs_told(values: Mapping[str, Any]) -> dict[str, object]:
    """Names of the files that a run reads beside its model, for its settings: `refine` asks for them."""
    told: dict[str, object] = {}
    for flag in _INPUTS:
        value = values[flag.name]
        if value not in (None, [], ()) and flag.name != "input_video":
            files: list[Any] = value if isinstance(value, list) else [value]
            names = [Path(getattr(file, "source", file)).name for file in files]
            told[flag.name] = names if isinstance(value, list) else names[0]
    return told


def with_origins(
    source: Path, settings: Mapping[str, object], values: Mapping[str, Any], typed: str
) -> dict[str, Any]:
    """Return ``values`` with the files that a video was made with, where no flag names others.

    Args:
        source: the video or picture.
        settings: of that file.
        values: of `FLAGS`.
        typed: the command so far, to which an error adds what is missing.

    Raises:
        CheckpointNotFoundError: for a model or LoRA that is in none of the folders that are looked into.
        AmbiguousModelError: where a name means several files.
        ArgumentError: for a file that names no model, or an input that has to be given again.
    """
    merged = dict(values)
    places = places_for(source, [_folder(path) for path in values["model"]])
    if not values["model"]:
        merged.update(_model(source, settings.get("models"), places, typed))
    if values["lora"] == [NO_LORA]:
        merged["lora"] = []
    elif not values["lora"]:
        merged["lora"] = _loras(source, settings.get("loras"), places, typed)
    _check_inputs(source, settings.get("inputs"), values, typed)
    return merged


def _folder(path: str) -> Path:
    named = Path(path).expanduser()
    return named if named.is_dir() else named.parent


def _model(source: Path, told: object, places: Sequence[Path], typed: str) -> dict[str, Any]:
    names = dict(told) if isinstance(told, Mapping) else {}
    if not names:
        raise ArgumentError(
            f"{source} does not tell which model made it. Name one:\n  {typed} --model FOLDER"
        )
    if all(map(is_tiny, names.values())):
        return {}  # what is used where nothing is named
    main = next((name for name in names.values() if isinstance(name, str)), "")
    folder = printable(main.split("/")[0]) if "/" in main else ""
    line = f"{typed} --model {_quoted_folder(folder)}"
    files = {part: _one(source, name, places, line) for part, name in names.items()}
    listed = list(dict.fromkeys(str(shard) for file in files.values() for shard in with_shards(file)))
    logger.info("%s was made with %s; using %s.", source, _joined(names.values()), ", ".join(listed))
    experts = [str(files[part]) for part in ("dit", "dit_low_noise") if part in files]
    return {"model": listed, "dit": experts if len(experts) == 2 else []}


def _loras(source: Path, told: object, places: Sequence[Path], typed: str) -> list[str]:
    loras: list[str] = []
    for name, strength in told.items() if isinstance(told, Mapping) else ():
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not _is_usable(strength):
            raise ArgumentError(
                f"{source} tells strength {printable(strength)} of the LoRA {printable(name)}; it was "
                f"changed. Name it:\n  {typed} --lora FILE:1.0"
            )
        line = f"{typed} --lora {_quoted(f'PATH/{printable(name)}:{strength:g}')}"
        file = _one(source, name, places, f"{line}\nor, without LoRAs:\n  {typed} --lora {NO_LORA}")
        logger.info("%s was made with the LoRA %s; using %s:%g.", source, printable(name), file, strength)
        loras.append(f"{file}:{float(strength)!r}")
    return loras


def _is_usable(strength: float) -> bool:
    return -1000 < strength < 1000 and not math.isnan(strength)


def _one(source: Path, name: object, places: Sequence[Path], line: str) -> Path:
    """The file that a name means; raises with the line to type where it is none, or one of several."""
    found = find_named(name, places)
    if len(found) == 1:
        return found[0]
    shown = printable(name)
    if found:
        raise AmbiguousModelError(
            f"{source} was made with {shown}, and several files have that name: "
            f"{', '.join(map(str, found))}. Name the one that it was:\n  {line}"
        )
    folders = dict.fromkeys(str(place.resolve()) for place in places[:2])
    raise CheckpointNotFoundError(
        f"{source} was made with {shown}, which is not in {', '.join(folders)} nor {MODELS}/. Name it "
        f"where it is:\n  {line}"
    )


def _check_inputs(source: Path, told: object, values: Mapping[str, Any], typed: str) -> None:
    inputs = dict(told) if isinstance(told, Mapping) else {}
    missing = [flag for flag in _INPUTS if flag.name in inputs and values[flag.name] in (None, [], ())]
    if not missing:
        return
    words = ""
    for flag in missing:
        names = inputs[flag.name]
        for name in names if isinstance(names, list) else [names]:
            words += f" --{flag.name.replace('_', '-')} {_quoted(f'PATH/{printable(name)}')}"
    raise ArgumentError(
        f"{source} was made from files that are not inside it. Name them again:\n  {typed}{words}"
    )


def _joined(names: Any) -> str:
    return ", ".join(dict.fromkeys(map(printable, names)))


def _quoted(text: str) -> str:
    return command_line([text], {}, ())


def _quoted_folder(folder: str) -> str:
    return _quoted(f"PATH/{folder}") if folder else "FOLDER"

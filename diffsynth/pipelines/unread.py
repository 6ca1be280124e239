"""Arguments of a call that the loaded model does not read: each stops the call and says why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from diffsynth.errors import UnusedInputError

if TYPE_CHECKING:
    from diffsynth.pipelines.components import PipelineComponents

OF_TWO_EXPERTS = ("cfg_scale_low_noise", "switch_DiT_boundary")


def why_unread(
    given: Mapping[str, object], resolved: Mapping[str, object], parts: PipelineComponents
) -> dict[str, str]:
    """Return, for each argument that this model cannot read, a sentence about it.

    A scale for the low-noise expert that equals the scale of the whole call asks for nothing.

    Args:
        given: by the caller.
        resolved: the same with defaults.
        parts: of the pipeline.
    """
    found = {}
    for name in OF_TWO_EXPERTS if parts.low is None and parts.high is not None else ():
        is_same = name == "cfg_scale_low_noise" and given.get(name) == resolved.get("cfg_scale")
        if given.get(name) is not None and not is_same:
            found[name] = (
                f"{name} is {given[name]}, and one DiT is loaded: it is for a high- and a low-noise expert, "
                "such as those of Wan2.2-A14B. Load both, or leave it out."
            )
    return found


def refuse_unread(
    given: Mapping[str, object],
    defaults: Mapping[str, object],
    readers: Iterable[type],
    why: Mapping[str, str],
) -> None:
    """Raise for the first argument that nobody reads. A value that is the default asks for nothing.

    Args:
        given: by the caller, without None.
        defaults: of every argument.
        readers: the dataclasses of all that take part in this call.
        why: sentences, see `why_unread`.

    Raises:
        UnusedInputError: with the argument's name and value.
    """
    if why:
        raise UnusedInputError(next(iter(why.values())))
    read = {field.name for kind in readers for field in fields(kind)}
    for name, value in given.items():
        if name not in read and not _is_default(value, defaults.get(name)):
            raise UnusedInputError(
                f"{name} was given, but nothing in this call reads it; leave it out, or give what it is for."
            )


def _is_default(value: object, default: object) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    return isinstance(value, (bool, int, float, str)) and value == default

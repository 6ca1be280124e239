"""What of a call the loaded models cannot do: an argument that they do not read, an encoder that is missing.

Each stops the call and says why. `pipelines.request` alone asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from diffsynth.conditioning.argument import MEDIA
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.errors import MissingModelError, UnusedInputError
from diffsynth.pipelines.options import call_arguments

if TYPE_CHECKING:
    from diffsynth.conditioning.conditioner import Conditioner
    from diffsynth.conditioning.facts import DiTFacts
    from diffsynth.pipelines.components import PipelineComponents

OF_TWO_EXPERTS = ("cfg_scale_low_noise", "switch_DiT_boundary")


def names_read_by(facts: DiTFacts) -> frozenset[str]:
    """Return the names of all arguments that a model with these facts reads as conditions."""
    return frozenset[str]().union(*(conditioner.reads(facts) for conditioner in CONDITIONERS.values()))


def refuse_unreadable(given: Mapping[str, object], facts: DiTFacts) -> None:
    """Raise for the first argument that takes another model. A value that is the default asks for nothing.

    Args:
        given: by the caller.
        facts: of the loaded DiT.

    Raises:
        UnusedInputError: with the models that read it.
    """
    read = names_read_by(facts)
    for name, each in call_arguments().items():
        value = given.get(name)
        if value is None or not each.unread or name in read or _is_default(value, each.default):
            continue
        raise UnusedInputError(f"{name} was given, but {each.unread}.")


def require_encoder(conditioner: Conditioner, inputs: object, parts: PipelineComponents) -> None:
    """Raise MissingModelError where a conditioner that applies asks an encoder that is not loaded."""
    name = conditioner.encoder
    if name not in ("vae", "image_encoder") or getattr(parts, name) is not None:
        return  # texts have other ways: the conditioner says so
    if not conditioner.needs_encoder(inputs, parts):
        return
    if name == "image_encoder":
        raise MissingModelError(
            "This model looks at its pictures through the CLIP image encoder, and none is loaded; load "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."
        )
    own = (each for each in call_arguments().values() if each.kind in MEDIA)
    what = next(each.name for each in own if getattr(inputs, each.name, None) is not None)
    raise MissingModelError(f"{what} needs the VAE; load it ({parts.facts.vae_file}).")


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

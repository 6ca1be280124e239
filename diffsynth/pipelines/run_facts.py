"""What decides the numbers of a run, as plain values: written beside saved steps, compared before they go on.

Settings stand as they are. Inputs, weights and LoRAs stand as hashes of their content, so that a file may
have moved and a network may rest elsewhere, but neither may have changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffsynth.checkpoints.hashing import hash_of_file, hash_of_parts, hash_of_tensors
from diffsynth.conditioning.text import TextInputs
from diffsynth.errors import ArgumentError
from diffsynth.ops.attention import attention_name
from diffsynth.ops.fp8 import dtype_name, fp8_layers
from diffsynth.pipelines.components import ENCODERS, PipelineComponents
from diffsynth.pipelines.experts import boundary_of
from diffsynth.pipelines.options import call_arguments
from diffsynth.video import VideoData

if TYPE_CHECKING:
    from diffsynth.pipelines.request import VideoRequest

Facts = Mapping[str, Any]  # as JSON reads it


def run_facts(
    request: VideoRequest, arguments: Mapping[str, object], parts: PipelineComponents, precision: str
) -> Facts:
    """The facts of a call that is about to begin; LoRAs as they are now.

    Args:
        request: the checked call.
        arguments: as the caller gave them.
        parts: of the pipeline.
        precision: of the pipeline.

    Raises:
        ArgumentError: for an input that has no content to tell it by.
    """
    # An argument that nobody thought of is compared.
    apart = {name for name, each in call_arguments().items() if "facts" not in each.records}
    settings = {name: value for name, value in request.settings.items() if name not in apart}
    inputs = {
        name: hash_of_value(name, value)
        for name, value in sorted(arguments.items())
        if value is not None and name not in settings and name not in apart
    }
    text = request.inputs["text"]
    assert isinstance(text, TextInputs)
    tokenizer = parts.tokenizer
    tokens = [] if tokenizer is None else [str(tokenizer.encode(each)) for each in text.distinct_texts]
    dit = None if parts.high is None else parts.high.dit
    facts = {
        "settings": settings,
        "inputs": inputs,
        "networks": {
            name: _hash_of_network(network)
            for name, network in parts.networks().items()
            if network is not None
        },
        "loras": parts.loras.facts(),
        "arithmetic": {
            "precision": precision,
            "dtype": dtype_name(parts.dtype),
            "boundary of the experts": boundary_of(parts, request.options),
            "attention kernel": None if dit is None else attention_name(dit.self_attention),
            "step cache": _name_of(request.options.step_cache),
            "fp8 compute": "fp8" if dit is not None and _multiplies_in_fp8(dit) else "widened",
        },
        "tokens": hash_of_parts(tokens) if tokens else None,
    }
    plain: Facts = json.loads(json.dumps(facts))
    return plain


def _name_of(cache: object) -> str | None:
    """A step cache with its settings, if its class tells them."""
    if cache is None:
        return None
    return type(cache).__name__ if type(cache).__repr__ is object.__repr__ else repr(cache)


def _hash_of_network(network: nn.Module) -> str:
    """Of its weights, and of what else decides its results: the statistics of a VAE's latents."""
    weights = hash_of_tensors([*network.named_parameters(), *network.named_buffers()])
    beside = getattr(network, "identity_beside_weights", b"")
    return hash_of_parts([weights, beside]) if beside else weights


def differences(then: Facts, now: Facts) -> list[str]:
    """In words, what of a run is not as it was; empty where nothing is.

    Args:
        then: facts of the run that was left.
        now: of the one that is to go on.
    """
    found = _differing_values(then["settings"], now["settings"])
    found += _differing_values(then["arithmetic"], now["arithmetic"])
    found += _differing_inputs(then["inputs"], now["inputs"])
    lora_lines = _differing_loras(then["loras"], now["loras"])
    found += lora_lines
    for name in sorted({*then["networks"], *now["networks"]}):
        before, after = then["networks"].get(name), now["networks"].get(name)
        if before == after or (name in ENCODERS and None in (before, after)):
            continue  # an encoder that is missing is asked for by whoever needs it
        if name not in ENCODERS and lora_lines:
            continue  # a LoRA is in its weights
        if None in (before, after):
            found.append(f"{name} was {'not ' * (before is None)}loaded and is {'not' * (after is None)} now")
        else:
            found.append(f"{name} has other weights, or another dtype, than the run had")
    if not found and None not in (then["tokens"], now["tokens"]) and then["tokens"] != now["tokens"]:
        found.append("the tokenizer reads the prompt in another way than the run's")
    return found


def hash_of_value(name: str, value: object) -> str:
    """Of the content of an input: numbers, texts, pictures, tensors, files of videos, or several of these.

    Args:
        name: of the argument, for errors.
        value: not an iterator, which can be read only once.

    Raises:
        ArgumentError: for what has no content that could be read.
    """
    if isinstance(value, Tensor):
        return hash_of_tensors([("", value)], is_whole=True)
    return hash_of_parts(_parts_of(name, value))


def _parts_of(name: str, value: object) -> Iterator[str | bytes]:
    if value is None or isinstance(value, (str, bytes, bool, int, float, Path)):
        yield from (type(value).__name__, repr(value))
    elif isinstance(value, VideoData):
        yield str((len(value), value.height, value.width))
        yield from map(hash_of_file, value.paths)
    elif isinstance(value, Mapping):
        yield from (part for key, each in value.items() for part in (str(key), hash_of_value(name, each)))
    elif callable(getattr(value, "tobytes", None)):  # a picture of PIL, an array or a number of numpy
        picture: Any = value
        yield from (str(getattr(value, key, "")) for key in ("mode", "size", "shape", "dtype"))
        yield picture.tobytes()
    elif isinstance(value, Iterable):
        yield from (hash_of_value(name, each) for each in value)
    elif callable(value):
        yield "a function"  # what it does cannot be told
    else:
        raise ArgumentError(
            f"{name} is a {type(value).__name__}, whose content save_steps= and resume_from= cannot tell; "
            "give pictures, tensors, numbers or a VideoData, or leave them out."
        )


def without_iterators(arguments: Mapping[str, object]) -> dict[str, object]:
    """Arguments of a call, with lists in place of what can be read only once."""
    return {name: list(value) if isinstance(value, Iterator) else value for name, value in arguments.items()}


def _multiplies_in_fp8(dit: nn.Module) -> bool:
    return any(layer.compute == "fp8" for layer in fp8_layers(dit))


def _differing_values(then: Facts, now: Facts) -> list[str]:
    return [
        f"{name} was {_short(then.get(name))} and is {_short(now.get(name))}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _differing_inputs(then: Facts, now: Facts) -> list[str]:
    words: dict[tuple[bool, bool], str] = {
        (True, False): "was given, and is missing now",
        (False, True): "is given now, and the run had none",
        (True, True): "is not what it was",
    }
    return [
        f"{name} {words[name in then, name in now]}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _differing_loras(then: Sequence[Facts], now: Sequence[Facts]) -> list[str]:
    def named(loras: Sequence[Facts]) -> str:
        return ", ".join(str(lora.get("name")) for lora in loras) or "none"

    if len(then) != len(now):
        return [f"the run had the LoRAs {named(then)}, and {named(now)} are loaded now"]
    found = []
    told: Sequence[tuple[str, Callable[[Facts], object]]] = (
        ("strength", lambda lora: lora.get("strength") if lora.get("is_on") else 0),
        ("mode", lambda lora: lora.get("mode")),
    )
    for before, after in zip(then, now, strict=True):
        if before.get("content") != after.get("content"):
            found.append(f"the LoRA {after['name']!r} is another than the run's {before.get('name')!r}")
            continue
        found += [
            f"the {word} of the LoRA {after['name']!r} was {_short(of(before))} and is {_short(of(after))}"
            for word, of in told
            if of(before) != of(after)
        ]
    return found


def _short(value: object) -> str:
    if value is None:
        return "not given"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

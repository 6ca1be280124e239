"""LoRA files of every dialect, read into one form: official layer names, and what changes in each layer.

Nothing is copied: factors are views of the mapped file. Keys that are no part of a LoRA, such as whole
modules that some files carry, are kept by name, so that a report can tell them.

Sources: PEFT, diffusers ``lora_conversion_utils.py``, kohya and musubi-tuner ``networks``, VideoX-Fun
``lora_utils.py``, LyCORIS, LightX2V ``lora_loader.py``, FastVideo ``lora_pipeline.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.hints import Role, role_of
from diffsynth.errors import LoRAError
from diffsynth.lora.changes import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank, Sum
from diffsynth.lora.foreign import foreign_family
from diffsynth.lora.names import FLAT, TEXT_ENCODER, FlatNames, is_diffusers, official_name, split_prefix

PART = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"lora_(?P<ab>A|B|down|up|mid|magnitude_vector)(?:\.(?P<adapter>(?!weight\b|bias\b)[\w-]+))?"
    r"(?:\.(?P<leaf>weight|bias))?"
    r"|(?P<other>alpha|lora_alpha|dora_scale|diff|diff_b|diff_m|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t[12])))"
)
PARTS = {"A": "down", "down": "down", "B": "up", "up": "up", "mid": "mid", "magnitude_vector": "dora_scale"}
TUCKER = {"mid", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2"}  # a core between the factors of a convolution
MODULATION = "modulation"


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerChange:
    """What a file changes in one layer: its weight, its bias, or both."""

    weight: Change | None = None
    bias: Tensor | None = None  # is added, times the strength
    keys: tuple[str, ...] = ()  # of the file


@dataclass(frozen=True, eq=False, kw_only=True)
class LoRA:
    """One LoRA, for one DiT and its adapters."""

    layers: Mapping[str, LayerChange]  # by official name; a tensor without a layer, by its own name
    dialect: str
    source: str = ""
    role: Role | None = None  # the expert it is for, where the file tells
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # why -> keys
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_keys(self) -> int:
        """Tensors of the file that are for it."""
        read = sum(len(layer.keys) for layer in self.layers.values())
        return read + sum(len(keys) for keys in self.unread.values())


@dataclass
class _Parts:
    """The tensors of one layer, by part, with the keys that they stood under."""

    tensors: dict[str, str] = field(default_factory=dict)

    def put(self, part: str, key: str, source: str) -> None:
        if part in self.tensors:
            raise LoRAError(
                f"{source} names one layer twice: {self.tensors[part]} and {key} are the same tensor. Remove "
                "one of them."
            )
        self.tensors[part] = key


def is_lora(checkpoint: Checkpoint) -> bool:
    """Whether any key is one of a LoRA."""
    return any(_part_of(split_prefix(key)[1]) is not None for key in checkpoint.shapes)


def read_loras(checkpoint: Checkpoint, layers: Iterable[str] = ()) -> list[LoRA]:
    """Read a file: one LoRA, or two for a file that names both experts.

    Args:
        checkpoint: the opened file.
        layers: official names of the layers of the loaded networks: flat names are looked for there first.

    Raises:
        LoRAError: when a layer stands there twice, lacks a factor, or is of a form that is not read.
    """
    if (family := foreign_family(checkpoint.shapes)) is not None:
        raise LoRAError(
            f"{checkpoint.source} is a LoRA for {family}, not for a Wan model (its keys are "
            f"{next(iter(checkpoint.shapes))} ...). Load one that was trained for the loaded model."
        )
    names = FlatNames(layers)
    found: dict[Role | None, dict[str, _Parts]] = {}
    unread: dict[Role | None, dict[str, list[str]]] = {}
    kinds: Counter[str] = Counter()
    for key in checkpoint.shapes:
        prefix, rest, role = split_prefix(key)
        split = _part_of(rest)
        why = "" if split is None else _refusal(key, split[0], names)
        if split is None or why:
            reason = why or "no part of a LoRA"
            unread.setdefault(role, {}).setdefault(reason, []).append(key)
            continue
        layer, part, spelling = split
        kinds[_dialect(prefix, layer, spelling)] += 1
        flat = FLAT.fullmatch(layer)
        official = official_name(layer) if flat is None else names.find(flat["flat"])
        assert official is not None
        if part == "diff_m":
            official, part = f"{official}.{MODULATION}", "diff"
        found.setdefault(role, {}).setdefault(official, _Parts()).put(part, key, checkpoint.source)
    if not found:
        raise LoRAError(
            f"{checkpoint.source} holds {len(checkpoint)} tensors and none is a LoRA's. "
            "To see what is inside: diffsynth inspect FILE."
        )
    alphas = _Alphas.of(checkpoint)
    from_file = role_of(checkpoint.paths, checkpoint.metadata)
    return [
        LoRA(
            layers={name: _layer(name, parts.tensors, checkpoint, alphas) for name, parts in by_name.items()},
            dialect=kinds.most_common(1)[0][0],
            source=checkpoint.source,
            role=(role or "high") if "low" in found and len(found) > 1 else role or from_file,
            unread={why: tuple(keys) for why, keys in unread.get(role, {}).items()},
            metadata=checkpoint.metadata,
        )
        for role, by_name in found.items()
    ]


def open_loras(path: str | Path, layers: Iterable[str] = ()) -> list[LoRA]:
    """`read_loras` of a file."""
    return read_loras(Checkpoint.open(path), layers)


def with_role(lora: LoRA, role: Role | None) -> LoRA:
    """The same LoRA, for the expert that a user names."""
    return replace(lora, role=role)


def _part_of(rest: str) -> tuple[str, str, str] | None:
    """Layer, part and spelling of a key without its prefix; None when it is no LoRA's."""
    found = PART.fullmatch(rest)
    if found is None:
        return None
    if found["other"] is not None:
        part = "alpha" if found["other"] == "lora_alpha" else found["other"]
        return found["layer"], part, found["other"]
    part = PARTS[found["ab"]]
    if found["leaf"] == "bias":
        part = "bias" if part == "up" else f"{part} bias"
    adapter = f".{found['adapter']}" if found["adapter"] else ""
    leaf = f".{found['leaf']}" if found["leaf"] else ""
    return found["layer"], part, f"lora_{found['ab']}{adapter}{leaf}"


def _refusal(key: str, layer: str, names: FlatNames) -> str:
    if TEXT_ENCODER.fullmatch(key):
        return "for the text encoder, whose LoRAs are not read"
    flat = FLAT.fullmatch(layer)
    if flat is not None and names.find(flat["flat"]) is None:
        return "for layers that no known network has"
    return ""


def _dialect(prefix: str, layer: str, spelling: str) -> str:
    for start, name in (("lora_unet__", "videox-fun"), ("lora_unet_", "kohya")):
        if layer.startswith(start):
            return name
    if "diffusion_model." in prefix:
        return "comfy"
    if prefix.endswith(("transformer.", "transformer_2.")):
        return "diffusers"
    if spelling in ("lora_A", "lora_B", "lora_alpha"):
        return "fastvideo"
    if prefix.startswith("pipe."):
        return "diffsynth"
    return "diffusers" if is_diffusers(layer) else "peft"


def _layer(name: str, parts: Mapping[str, str], checkpoint: Checkpoint, alphas: _Alphas) -> LayerChange:
    def get(part: str) -> Tensor | None:
        return checkpoint.tensor(parts[part]) if part in parts else None

    refused = [parts[part] for part in parts if part in TUCKER or part.endswith(" bias")]
    if refused:
        raise LoRAError(
            f"{checkpoint.source}: {refused[0]} is of a form that this version does not read (Tucker cores "
            "of convolutions, a bias inside a LoRA). Train it without, or convert it with its own tool."
        )
    given = get("alpha")
    if given is not None and given.numel() != 1:
        raise LoRAError(
            f"{checkpoint.source}: {parts['alpha']} has shape {tuple(given.shape)}; expected one number."
        )
    weight: Change | None = _weight(name, parts, checkpoint, None if given is None else float(given))
    biases = [part for part in ("diff_b", "bias") if part in parts]
    if len(biases) > 1:
        raise LoRAError(
            f"{checkpoint.source} changes the bias of {name} twice: {', '.join(parts[b] for b in biases)}."
        )
    bias = get(biases[0]) if biases else None
    if isinstance(weight, LowRank | Kronecker) and given is None and weight.rank is not None:
        weight = replace(weight, alpha=alphas.of_layer(parts, weight.rank))
    if bias is not None and biases == ["bias"] and isinstance(weight, LowRank) and weight.scale != 1.0:
        bias = bias * weight.scale  # the bias of the second factor is scaled with it
    magnitude = get("dora_scale")
    if magnitude is not None:
        if weight is None or isinstance(weight, Decomposed):
            raise LoRAError(
                f"{checkpoint.source}: {parts['dora_scale']} stands alone; a DoRA layer has factors too."
            )
        weight = Decomposed(weight, magnitude)
    if weight is None and bias is None:
        raise LoRAError(f"{checkpoint.source}: of {name} there is only {', '.join(parts.values())}.")
    return LayerChange(weight=weight, bias=bias, keys=tuple(parts.values()))


def _weight(name: str, parts: Mapping[str, str], checkpoint: Checkpoint, alpha: float | None) -> Sum | None:
    def get(part: str) -> Tensor:
        if part not in parts:
            raise LoRAError(
                f"{checkpoint.source}: layer {name} has {', '.join(parts.values())} and lacks {part}; "
                "the file is incomplete."
            )
        return checkpoint.tensor(parts[part])

    def pair(part: str) -> Tensor | tuple[Tensor, Tensor]:
        return get(part) if part in parts else (get(f"{part}_a"), get(f"{part}_b"))

    found: list[Sum] = []
    if "down" in parts or "up" in parts:
        found.append(LowRank(get("down"), get("up"), alpha))
    if any(part.startswith("hada_") for part in parts):
        w1_a, w1_b, w2_a, w2_b = (get(f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        found.append(Hadamard(w1_a, w1_b, w2_a, w2_b, alpha))
    if any(part.startswith("lokr_") for part in parts):
        found.append(Kronecker(pair("lokr_w1"), pair("lokr_w2"), alpha))
    if "diff" in parts:
        found.append(Difference(get("diff")))
    if len(found) > 1:
        raise LoRAError(
            f"{checkpoint.source} changes the weight of {name} in {len(found)} ways: "
            f"{', '.join(parts.values())}."
        )
    if found:
        _check_factors(name, found[0], checkpoint.source)
    return found[0] if found else None


def _check_factors(name: str, change: Sum, source: str) -> None:
    pairs: list[tuple[Tensor, Tensor]] = []
    if isinstance(change, LowRank):
        pairs = [(change.up, change.down)]
    elif isinstance(change, Hadamard):
        pairs = [(change.w1_a, change.w1_b), (change.w2_a, change.w2_b)]
    elif isinstance(change, Kronecker):
        pairs = [w for w in (change.w1, change.w2) if isinstance(w, tuple)]
    for left, right in pairs:
        if left.ndim < 2 or right.ndim < 2 or left.shape[1] != right.shape[0] or 0 in left.shape:
            raise LoRAError(
                f"{source}: the factors of {name} have shapes {tuple(left.shape)} and {tuple(right.shape)}, "
                "which do not multiply; the file is damaged."
            )


@dataclass(frozen=True)
class _Alphas:
    """Alphas that stand beside the factors: in diffusers' metadata, or in PEFT's adapter_config.json."""

    settings: Mapping[str, Mapping[str, object]]  # prefix of the keys -> its LoraConfig

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Alphas:
        text = checkpoint.metadata.get("lora_adapter_metadata")
        if text is not None:
            settings: dict[str, dict[str, object]] = {}
            for name, value in _json(text).items():
                prefix, _, setting = name.partition(".")
                settings.setdefault(f"{prefix}.", {})[setting] = value
            return cls(settings)
        beside = checkpoint.paths[0].parent / "adapter_config.json" if checkpoint.paths else None
        if beside is not None and beside.is_file() and checkpoint.paths[0].stem.startswith("adapter_model"):
            return cls({"": _json(beside.read_text("utf-8", errors="replace"))})
        return cls({})

    def of_layer(self, parts: Mapping[str, str], rank: int) -> float | None:
        key = next(iter(parts.values()))
        for prefix, settings in self.settings.items():
            if not key.startswith(prefix):
                continue
            alpha = settings.get("lora_alpha")
            pattern = settings.get("alpha_pattern")
            for name, value in pattern.items() if isinstance(pattern, Mapping) else ():
                if re.search(rf"(?:^|\.){name}\.lora_", key):
                    alpha = value
            if isinstance(alpha, (int, float)):
                return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
        return None


def _json(text: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

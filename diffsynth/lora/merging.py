"""Whole checkpoints and LoRAs: merged into one file, or a LoRA taken from the difference of two.

Tensors go one by one from the mapped files into the new one: a 14B model needs the memory of one layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.checkpoints.architecture import Match
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.mapped import DTYPES, SPELLING
from diffsynth.errors import LoRAError
from diffsynth.lora.changes import Change, Difference, LowRank, changed
from diffsynth.lora.extract import low_rank
from diffsynth.lora.formats import LayerChange, LoRA
from diffsynth.lora.matching import Network, fit
from diffsynth.video.paths import check_not_read, replacing


def merge(
    base: Sequence[Match], loras: Sequence[tuple[LoRA, float]], path: Path
) -> dict[str, tuple[str, ...]]:
    """Write a checkpoint with LoRAs fused into it, under the official names and with its sizes inside.

    Args:
        base: the networks of one checkpoint.
        loras: with their strengths.
        path: of the new .safetensors file.

    Returns:
        Why -> keys of the LoRAs that were not used.

    Raises:
        LoRAError: when a LoRA fits nowhere.
        OutputPathError: when ``path`` is one of the files that are read, or the disk refuses; nothing
            half-written stays.
    """
    check_not_read(path, [file for match in base for file in match.checkpoint.paths])
    check_not_read(path, [lora.source for lora, _ in loras if lora.source])
    networks = [Network(title=m.needs, source=m.checkpoint.source, shapes=m.checkpoint.shapes) for m in base]
    sums: dict[str, list[tuple[Change, float]]] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for lora, weight in loras:
        fitted, unused = fit(lora, networks)
        missing |= {why: (*missing.get(why, ()), *keys) for why, keys in unused.items()}
        for name, change in ((n, c) for some in fitted for n, c in some.items()):
            sums.setdefault(name, []).append((change, weight))
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for match in base:
        for name, shape in match.checkpoint.shapes.items():
            specs[name] = (_plain_dtype(match.checkpoint.dtypes[name]), shape)
    homes = {name: match.checkpoint for match in base for name in match.checkpoint.shapes}

    def tensor(name: str) -> Tensor:
        dtype = getattr(torch, DTYPES[specs[name][0]][1])
        original = homes[name].tensor(name, dtype=dtype)
        return changed(original, sums[name], dtype) if name in sums else original

    config = {key: value for match in reversed(base) for key, value in match.config.items()}
    metadata = {**base[0].checkpoint.metadata, "config": json.dumps(config), "format": "pt"}
    metadata.pop("_quantization_metadata", None)
    if base[0].role is not None:  # the new name need not tell it
        metadata["expert"] = base[0].role
    write_one_by_one(path, specs, tensor, metadata)
    return missing


def _plain_dtype(dtype: str) -> str:
    """Quantised weights are written wide."""
    return "BF16" if dtype.startswith(("F8_", "I8")) else dtype


def extract(
    tuned: Checkpoint, base: Checkpoint, rank: int, tell: Callable[[str], None] = lambda name: None
) -> LoRA:
    """Take a LoRA from what a fine-tune changed: matrices by SVD, everything else as it differs.

    Args:
        tuned: under official names.
        base: that it was made from.
        rank: of the factors.
        tell: is called with the name of each tensor.

    Raises:
        LoRAError: when the two are no pair, or are equal.
    """
    strange = [n for n in tuned.shapes if n in base and tuned.shapes[n] != base.shapes[n]]
    common = [name for name in tuned.shapes if name in base]
    if strange or not common:
        what = f"{strange[0]} has other sizes" if strange else "no tensor is in both"
        raise LoRAError(f"{tuned.source} was not made from {base.source}: {what}.")
    layers: dict[str, LayerChange] = {}
    for name in common:
        tell(name)
        difference = tuned.tensor(name, dtype=torch.float32) - base.tensor(name, dtype=torch.float32)
        if not bool(difference.any()):
            continue
        kind = getattr(torch, DTYPES[_plain_dtype(tuned.dtypes[name])][1])
        layer, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            layer, leaf = name, "weight"
        old = layers.get(layer, LayerChange())
        if leaf == "bias":
            layers[layer] = replace(old, bias=difference.to(kind))
        elif difference.ndim == 2:
            down, up = low_rank(difference, rank)
            layers[layer] = replace(old, weight=LowRank(down.to(kind).contiguous(), up.to(kind).contiguous()))
        else:
            layers[layer] = replace(old, weight=Difference(difference.to(kind)))
    if not layers:
        raise LoRAError(
            f"{tuned.source} and {base.source} hold the same numbers; there is nothing to extract."
        )
    return LoRA(layers=layers, dialect="comfy", source=tuned.source)


def write_one_by_one(
    path: Path,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file whose tensors are made when their turn comes.

    Args:
        path: of the file; it appears when it is complete, or not at all.
        specs: dtype, as in a header, and shape of each tensor.
        tensor: makes one.
        metadata: texts for the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        size = prod(shape) * DTYPES[dtype][0] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in specs.items():
            made = tensor(name)
            assert SPELLING[str(made.dtype).removeprefix("torch.")] == dtype and made.shape == shape
            for part in _bytes_of(made):
                file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        yield memoryview(flat.numpy())  # type: ignore[arg-type]

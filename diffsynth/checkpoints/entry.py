"""One tensor of a checkpoint: its sizes now, its elements when asked for; views of views without copies.

A quantised weight travels as a pair (stored elements, scale); weight = stored.float() * scale. The scale has
one number, one per row, or one per block of each row. Sources of the layouts: ComfyUI ``convert_old_quants``,
LightX2V ``tools/convert``, musubi-tuner ``fp8_optimization_utils``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from diffsynth.checkpoints.layout import Step
from diffsynth.checkpoints.mapped import SPELLING, MappedFile, StoredTensor
from diffsynth.errors import CorruptCheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor | None]

# Tensors that ride beside a quantised `<module>.weight`; none of them is a weight of the network.
SIDE_KEY = re.compile(
    r"(?P<module>.+)\.(?P<kind>scale_weight|scale_input|weight_scale|weight_scale_2|weight_global_scale|input_scale"
    r"|pre_quant_scale|comfy_quant)"
)
MARKER = re.compile(r"(?:.+\.)?scaled_fp8")
READABLE_FORMATS = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"}


@dataclass(frozen=True, slots=True)
class Entry:
    """Shape, stored dtype and bytes of one tensor, and how to get it."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    load: Callable[[], Pair]  # the stored elements and their scale
    is_scaled: bool = False

    @property
    def is_quantised(self) -> bool:
        """Whether the stored elements are too coarse to compute with: they are widened on reading."""
        return self.is_scaled or self.dtype.startswith("F8_")


def stored_entry(file: MappedFile, stored: StoredTensor) -> Entry:
    """Return the entry of a tensor as it lies in its file."""
    return Entry(stored.shape, stored.dtype, stored.num_bytes, lambda: (file.view(stored), None))


def memory_entry(tensor: Tensor) -> Entry:
    """Return the entry of a tensor that is in memory; it is read on the CPU, as a file's is."""
    dtype = SPELLING.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))
    size = tensor.numel() * tensor.element_size()
    return Entry(tuple(tensor.shape), dtype, size, lambda: (tensor.detach().cpu(), None))


def join_scales(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> dict[str, Entry]:
    """Return the entries without quantisation side keys; each weight that has a scale now knows it."""
    sides: dict[str, dict[str, Entry]] = {}
    kept: dict[str, Entry] = {}
    for name, entry in entries.items():
        side = SIDE_KEY.fullmatch(name)
        if side and f"{side['module']}.weight" in entries:
            sides.setdefault(f"{side['module']}.weight", {})[side["kind"]] = entry
        elif not MARKER.fullmatch(name):
            kept[name] = entry
    formats = _formats(metadata) if sides else {}
    for name, side_entries in sides.items():
        kept[name] = _scaled(name, kept[name], side_entries, formats.get(name.removesuffix(".weight")))
    return kept


def _formats(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return {module: str(conf.get("format")) for module, conf in layers.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _scaled(name: str, weight: Entry, sides: Mapping[str, Entry], named_format: str | None) -> Entry:
    scale = sides.get("scale_weight") or sides.get("weight_scale")
    foreign = sorted({"weight_scale_2", "weight_global_scale", "pre_quant_scale"} & set(sides))
    conf = sides.get("comfy_quant")

    def load() -> Pair:
        stored_format = named_format if conf is None else _format_of(name, conf)
        if foreign or stored_format not in (None, *READABLE_FORMATS):
            raise UnsupportedModelError(
                f"{name} is quantised as {stored_format or 'a format'} with "
                f"{', '.join(foreign) or 'its own scales'}; this version reads "
                f"{', '.join(sorted(READABLE_FORMATS))}. Use the fp8 or bf16 file of this model."
            )
        raw = weight.load()[0]
        return raw, None if scale is None else _shaped_scale(name, scale.load()[0], raw)

    side_bytes = 0 if scale is None else scale.num_bytes
    return replace(weight, num_bytes=weight.num_bytes + side_bytes, load=load, is_scaled=scale is not None)


def _format_of(name: str, conf: Entry) -> str:
    try:
        return str(json.loads(bytes(conf.load()[0].flatten().tolist()).decode("utf-8")).get("format"))
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise CorruptCheckpointError(f"comfy_quant of {name} is not JSON; the file is damaged.") from None


def _shaped_scale(name: str, scale: Tensor, raw: Tensor) -> Tensor:
    """Return the scale as float32, shaped to multiply ``raw``: (), (rows, 1, ...) or (rows, blocks, 1)."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if raw.ndim and scale.numel() == raw.shape[0]:
        return scale.reshape(-1, *(1 for _ in raw.shape[1:]))
    if (
        scale.ndim == 3
        and raw.ndim == 2
        and scale.shape[0] == raw.shape[0]
        and raw.shape[1] % scale.shape[1] == 0
    ):
        return scale
    raise UnsupportedModelError(
        f"The scale of {name} has shape {tuple(scale.shape)} for a weight of shape {tuple(raw.shape)}; this "
        "version reads one scale per tensor, per row, or per block of a row."
    )


def widened(raw: Tensor, scale: Tensor | None) -> Tensor:
    """Return stored elements times their scale, in float32."""
    wide = raw.float()
    if scale is None:
        return wide
    if scale.ndim == 3 and wide.ndim == 2:
        return (wide.view(wide.shape[0], scale.shape[1], -1) * scale).view_as(wide)
    return wide * scale


def apply_step(step: Step, entries: Mapping[str, Entry], target: str) -> Entry:
    """Return the entry that a step of a renaming makes of its sources."""
    sources = [entries[name] for name in step.sources]
    entry = sources[0] if len(sources) == 1 else _concatenated(target, sources)
    index, count = step.chunk
    if count > 1:
        entry = _chunk(target, entry, index, count)
    if step.ones != (0, 0):
        entry = _reshaped(target, entry, step.ones)
    return _transposed(target, entry) if step.transposed else entry


def _concatenated(target: str, parts: list[Entry]) -> Entry:
    if len({(part.shape[1:], part.dtype) for part in parts}) > 1 or not all(part.shape for part in parts):
        raise CorruptCheckpointError(
            f"The parts of {target} do not fit together: {[(part.shape, part.dtype) for part in parts]}."
        )

    def load() -> Pair:
        import torch

        pairs = [part.load() for part in parts]
        # fp8 cannot be concatenated everywhere; its bytes can
        is_fp8 = parts[0].dtype.startswith("F8_")
        joined = torch.cat([raw.view(torch.uint8) if is_fp8 else raw for raw, _ in pairs])
        joined = joined.view(pairs[0][0].dtype)
        if all(scale is None for _, scale in pairs):
            return joined, None
        return joined, torch.cat([_scale_per_row(raw, scale) for raw, scale in pairs])

    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(
        shape, parts[0].dtype, sum(p.num_bytes for p in parts), load, any(p.is_scaled for p in parts)
    )


def _scale_per_row(raw: Tensor, scale: Tensor | None) -> Tensor:
    import torch

    if scale is None:
        scale = torch.ones(())
    if scale.ndim:
        return scale
    return scale.expand(raw.shape[0]).reshape(-1, *(1 for _ in raw.shape[1:]))


def _chunk(target: str, entry: Entry, index: int, count: int) -> Entry:
    if not entry.shape or entry.shape[0] % count:
        raise CorruptCheckpointError(
            f"{target} should be a part of a tensor of shape {entry.shape} cut into {count}."
        )
    rows = entry.shape[0] // count

    def load() -> Pair:
        raw, scale = entry.load()
        piece = slice(index * rows, (index + 1) * rows)
        return raw[piece], scale[piece] if scale is not None and scale.ndim else scale

    return replace(entry, shape=(rows, *entry.shape[1:]), num_bytes=entry.num_bytes // count, load=load)


def _reshaped(target: str, entry: Entry, ones: tuple[int, int]) -> Entry:
    front, behind = ones
    if front > 0 or behind > 0:
        shape = (1,) * front + entry.shape + (1,) * behind
    else:
        shape = entry.shape[-front : len(entry.shape) + behind]
    if prod(shape) != prod(entry.shape) or entry.is_scaled:
        raise CorruptCheckpointError(f"{target} cannot be made of a tensor of shape {entry.shape}.")
    return replace(entry, shape=shape, load=lambda: (entry.load()[0].reshape(shape), None))


def _transposed(target: str, entry: Entry) -> Entry:
    if len(entry.shape) != 2 or entry.is_scaled:
        raise CorruptCheckpointError(
            f"{target} should be the transpose of a matrix, not of shape {entry.shape}."
        )
    return replace(entry, shape=entry.shape[::-1], load=lambda: (entry.load()[0].T, None))

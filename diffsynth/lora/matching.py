"""Which layers of a LoRA fit which network, and one line that tells it. Shapes only; no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from diffsynth.errors import LoRAError
from diffsynth.lora.changes import Change, Difference, rank_of
from diffsynth.lora.formats import LayerChange, LoRA

IN_BLOCK = re.compile(r"(?:vace_)?blocks\.(\d+)\.")
_IMAGE = re.compile(r"img_emb\.|.*\.(?:k_img|v_img|norm_k_img)$")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that LoRAs may change, by its checkpoint's tensors."""

    title: str  # "wan_video_dit (t2v)"
    source: str
    shapes: Shapes


@dataclass(frozen=True, kw_only=True)
class LoRAReport:
    """What of a LoRA fitted, what did not, and why; ``str()`` says it in one line."""

    name: str
    source: str
    lora: LoRA
    mode: str
    weight: float
    fitted: Mapping[str, int]  # network -> layers that were changed
    num_keys_read: int
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # why -> keys

    def __str__(self) -> str:
        return self.told(f"strength {self.weight:g}")

    def told(self, strength: str) -> str:
        """One line, with the strength in words."""
        lora = self.lora
        ranks = Counter(rank_of(layer.weight) for layer in lora.layers.values() if layer.weight is not None)
        kinds = ", ".join(kind for kind, _ in ranks.most_common(3))
        where = " and ".join(f"{count} layers of {title}" for title, count in self.fitted.items())
        text = (
            f"{self.source}: {_title(lora)} {self.name!r} ({lora.dialect}, {kinds}) "
            f"{'fused into' if self.mode == 'fuse' else 'attached to'} {where}, {strength}: "
            f"{self.num_keys_read} of {lora.num_keys} keys used"
        )
        for why, keys in self.missing.items():
            text += f"; {len(keys)} of {lora.num_keys} keys are {why} ({keys[0]}{' ...' if keys[1:] else ''})"
        return text


def fit(
    lora: LoRA, networks: Sequence[Network]
) -> tuple[list[dict[str, Change]], dict[str, tuple[str, ...]]]:
    """Tell what a LoRA changes in each network: changes by name of the tensor; and why -> keys that fit none.

    Raises:
        LoRAError: when it fits nowhere, or is for a DiT of another size; says both sizes.
    """
    changes: list[dict[str, Change]] = []
    fitted: set[str] = set()
    others: list[tuple[Network, list[str]]] = []
    for network in networks:
        found = {n: c for n, layer in lora.layers.items() if (c := _tensors(n, layer, network.shapes))}
        wrong = [n for n, c in found.items() if not all(_fits(network.shapes[t], v) for t, v in c.items())]
        strange = [n for n in wrong if IN_BLOCK.match(n)]
        if strange:
            others.append((network, strange))
            changes.append({})
            continue
        fitted.update(set(found) - set(wrong))
        changes.append({t: v for n, c in found.items() if n not in wrong for t, v in c.items()})
    if not fitted and others:
        raise _other_size(lora, *others[0])
    missing = _reasons(lora, fitted, networks)
    if not fitted:
        loaded = ", ".join(network.title for network in networks) or "none"
        reasons = "; ".join(f"{len(keys)} keys are {why} ({keys[0]})" for why, keys in missing.items())
        raise LoRAError(
            f"{lora.source}: none of its {lora.num_keys} keys fits a loaded network ({loaded}): {reasons}. "
            "Load the model that it was trained for."
        )
    return changes, missing


def _tensors(name: str, layer: LayerChange, shapes: Shapes) -> dict[str, Change]:
    """The tensors of a network that a layer's change is for; none when one of them is not there."""
    found: dict[str, Change] = {}
    if layer.weight is not None:
        found[name if name in shapes else f"{name}.weight"] = layer.weight
    if layer.bias is not None:
        found[f"{name}.bias"] = Difference(layer.bias)
    return found if all(tensor in shapes for tensor in found) else {}


def _fits(shape: tuple[int, ...], change: Change) -> bool:
    return change.shape == ((1, shape[0]) if len(shape) == 1 else (shape[0], prod(shape[1:])))


def _other_size(lora: LoRA, network: Network, strange: Sequence[str]) -> LoRAError:
    name = next((n for n in strange if n.endswith("self_attn.q")), strange[0])
    layer = lora.layers[name]
    tensor = next(iter(_tensors(name, layer, network.shapes)))
    change = layer.weight if layer.weight is not None else Difference(layer.bias)  # type: ignore[arg-type]
    own, has = change.shape, network.shapes[tensor]
    return LoRAError(
        f"{lora.source} is a LoRA for a DiT of another size: its {name} is {own[0]} x {own[1]} "
        f"({_num_blocks(lora.layers)} blocks), and {network.title} of {network.source} has "
        f"{' x '.join(map(str, has))} ({_num_blocks(network.shapes)} blocks). Load a LoRA for this size."
    )


def _num_blocks(names: Mapping[str, object]) -> int:
    return 1 + max((int(found[1]) for name in names if (found := IN_BLOCK.match(name))), default=-1)


def _reasons(lora: LoRA, fitted: set[str], networks: Sequence[Network]) -> dict[str, tuple[str, ...]]:
    missing: dict[str, list[str]] = {}
    for name, layer in lora.layers.items():
        if name not in fitted:
            missing.setdefault(_reason(name, layer, networks), []).extend(layer.keys or (name,))
    for why, keys in lora.unread.items():
        missing.setdefault(why, []).extend(keys)
    return {why: tuple(keys) for why, keys in missing.items()}


def _reason(name: str, layer: LayerChange, networks: Sequence[Network]) -> str:
    if any(_tensors(name, layer, network.shapes) for network in networks):
        return "for layers of another size"
    if _IMAGE.match(name):
        return "for image cross-attention, which this model lacks"
    if name.startswith("vace_"):
        return "for VACE layers, which are not loaded"
    return "for layers that no loaded network has"


def _title(lora: LoRA) -> str:
    if any(_IMAGE.match(name) for name in lora.layers):
        return "Wan2.1 I2V LoRA"
    return "VACE LoRA" if any(name.startswith("vace_") for name in lora.layers) else "LoRA"

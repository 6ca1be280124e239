"""LoRA files written in four dialects. What a dialect cannot name is an error, never left out.

comfy      diffusion_model.blocks.0.self_attn.q.lora_A.weight, .alpha, .diff, .diff_b; LoHa, LoKr, DoRA too
kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha; LoHa, LoKr, DoRA too
diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight, lora_B.bias; alpha is folded into B
peft       blocks.0.self_attn.q.lora_A.default.weight, as DiffSynth writes it; alpha is folded into B
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.checkpoints.saving import save_tensors
from diffsynth.errors import ArgumentError, LoRAError
from diffsynth.lora.changes import Decomposed, Difference, Hadamard, Kronecker, LowRank, delta, tensors_of
from diffsynth.lora.extract import low_rank
from diffsynth.lora.formats import MODULATION, LayerChange, LoRA
from diffsynth.lora.names import diffusers_name, flat
from diffsynth.video.paths import check_not_read

DIALECTS = ("comfy", "kohya", "diffusers", "peft")
_FOLDED_IN = ("diffusers", "peft")  # these have no place for an alpha
# tells alphas of the file that was read, which are in the factors now; and the expert of its first LoRA
_NOT_KEPT = ("lora_adapter_metadata", "expert")


def write_loras(path: Path, loras: Sequence[LoRA], dialect: str) -> None:
    """Write one LoRA; or, in diffusers' names, the two of a pair of experts.

    Raises:
        LoRAError: for layers or kinds of change that the dialect cannot name; lists them.
        ArgumentError: for an unknown dialect.
        OutputPathError: when ``path`` is the file of one of the LoRAs.
    """
    check_not_read(path, [lora.source for lora in loras if lora.source])
    tensors: dict[str, Tensor] = {}
    for lora in loras:
        prefix = "transformer_2." if len(loras) > 1 and lora.role == "low" else "transformer."
        tensors |= lora_tensors(lora, dialect, prefix)
    if len(loras) > 1 and dialect != "diffusers":
        raise LoRAError(
            f"{loras[0].source} holds LoRAs of both experts; {dialect} has names for one: choose it with "
            "network='high' or network='low' (--network), or write 'diffusers'."
        )
    metadata = {k: v for lora in loras for k, v in lora.metadata.items() if k not in _NOT_KEPT}
    if len(loras) == 1 and loras[0].role is not None:  # the new name need not tell it
        metadata["expert"] = loras[0].role
    save_tensors(path, _without_shared_memory(tensors), {**metadata, "format": "pt"})


def lora_tensors(lora: LoRA, dialect: str, diffusers_prefix: str = "transformer.") -> dict[str, Tensor]:
    """The tensors of a LoRA under the names of a dialect; raises as `write_loras`."""
    if dialect not in DIALECTS:
        raise ArgumentError(f"dialect is {dialect!r}; known: {', '.join(DIALECTS)}.")
    naming = {
        "comfy": lambda layer: f"diffusion_model.{layer}",
        "kohya": lambda layer: f"lora_unet_{flat(layer)}",
        "diffusers": lambda layer: None if (n := diffusers_name(layer)) is None else diffusers_prefix + n,
        "peft": lambda layer: layer,
    }[dialect]
    tensors, refused = _named(lora, dialect, naming)
    if refused:
        shown = "; ".join(refused[:6]) + (f"; and {len(refused) - 6} more" if len(refused) > 6 else "")
        raise LoRAError(
            f"{dialect} has no names for {len(refused)} of {len(lora.layers)} layers of "
            f"{lora.source or 'this LoRA'}: {shown}. 'comfy' names them all; LoHa, LoKr and whole "
            "differences become A and B with svd=RANK (--svd RANK)."
        )
    return tensors


def to_low_rank(lora: LoRA, rank: int) -> LoRA:
    """Replace LoHa, LoKr and whole differences of matrices by their best A and B of a rank, by SVD."""
    if rank < 1:
        raise ArgumentError(f"svd is {rank}; give a rank of 1 or more (32 is usual).")
    layers: dict[str, LayerChange] = {}
    for name, layer in lora.layers.items():
        change, new = layer.weight, layer
        is_matrix = isinstance(change, Difference) and change.diff.ndim == 2
        if isinstance(change, (Hadamard, Kronecker)) or is_matrix:
            assert change is not None
            whole = delta(change, torch.zeros(change.shape))
            down, up = low_rank(whole, rank)
            kind = next(iter(tensors_of(change).values())).dtype
            new = replace(layer, weight=LowRank(down.to(kind), up.to(kind)))
        layers[name] = new
    return replace(lora, layers=layers)


def _named(
    lora: LoRA, dialect: str, naming: Callable[[str], str | None]
) -> tuple[dict[str, Tensor], list[str]]:
    tensors: dict[str, Tensor] = {}
    refused: list[str] = []
    for layer, change in lora.layers.items():
        name = naming(layer)
        if name is None:
            refused.append(f"{layer} (the layer)")
            continue
        parts = _parts(change, dialect)
        unnamed = [part for part, tensor in parts.items() if tensor is None]
        if unnamed:
            refused.append(f"{layer} ({', '.join(unnamed)})")
            continue
        for part, tensor in parts.items():
            assert tensor is not None
            if part == "diff" and layer.endswith(f".{MODULATION}"):
                tensors[f"{name.removesuffix(f'.{MODULATION}')}.diff_m"] = tensor
            else:
                tensors[f"{name}.{part}"] = tensor
    return tensors, refused


def _parts(layer: LayerChange, dialect: str) -> dict[str, Tensor | None]:
    """Suffix -> tensor of one layer; None for a part that the dialect has no name for."""
    change, parts = layer.weight, dict[str, Tensor | None]()
    has_all = dialect in ("comfy", "kohya")
    if isinstance(change, Decomposed):
        parts["dora_scale"] = change.magnitude if has_all else None
        change = change.inner
    if isinstance(change, LowRank):
        parts |= _pair(change, dialect)
    elif isinstance(change, Hadamard):
        for name in ("w1_a", "w1_b", "w2_a", "w2_b"):
            parts[f"hada_{name}"] = getattr(change, name) if has_all else None
        parts |= _alpha(change.alpha if has_all else None)
    elif isinstance(change, Kronecker):
        for number, matrix in (("1", change.w1), ("2", change.w2)):
            if isinstance(matrix, tuple):
                parts |= {f"lokr_w{number}_{s}": m if has_all else None
                          for s, m in zip("ab", matrix, strict=True)}  # fmt: skip
            else:
                parts[f"lokr_w{number}"] = matrix if has_all else None
        parts |= _alpha(change.alpha if has_all else None)
    elif isinstance(change, Difference):
        parts["diff"] = change.diff if dialect == "comfy" else None
    if layer.bias is not None:
        with_pair = dialect == "diffusers" and isinstance(change, LowRank)
        parts["lora_B.bias" if with_pair else "diff_b"] = (
            layer.bias if dialect == "comfy" or with_pair else None
        )
    return parts


def _pair(change: LowRank, dialect: str) -> dict[str, Tensor | None]:
    down, up = change.down, change.up
    if dialect in _FOLDED_IN and change.scale != 1.0:
        up = (up.double() * change.scale).to(up.dtype)  # rounded once
    if dialect == "kohya":
        rank = change.rank if change.alpha is None else change.alpha  # readers of this dialect ask for it
        return {"lora_down.weight": down, "lora_up.weight": up, **_alpha(float(rank))}
    adapter = ".default" if dialect == "peft" else ""
    pair: dict[str, Tensor | None] = {f"lora_A{adapter}.weight": down, f"lora_B{adapter}.weight": up}
    return pair if dialect in _FOLDED_IN else {**pair, **_alpha(change.alpha)}


def _alpha(alpha: float | None) -> Mapping[str, Tensor]:
    return {} if alpha is None else {"alpha": torch.tensor(alpha, dtype=torch.float32)}


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, as the file's library demands."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

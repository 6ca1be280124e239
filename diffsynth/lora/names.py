"""Names of layers in LoRA files: from any dialect to the official ones, and back.

A key is a prefix that names the network (``diffusion_model.``), a layer (``blocks.0.self_attn.q``) and a part
(``lora_A.weight``). Layers go by their official names, by those of diffusers, or flat, with ``_`` for ``.``.
Flat names are looked up, not split by rules: they are those of the layers that a Wan network can have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from diffsynth.checkpoints.hints import Role
from diffsynth.checkpoints.layouts import DIFFUSERS_DIT

PREFIX = re.compile(
    r"(?:(?:state_dict|module|_orig_mod|base_model\.model|model\.diffusion_model|diffusion_model|model|dit"
    r"|pipe\.(?:dit|vace|motion_controller|animate_adapter)2?|transformer(?:_[12])?)\.)+"
)
# ai-toolkit's file of both stages: diffusion_model.transformer_1. is for high noise, .transformer_2. for low
HIGH_EXPERT = re.compile(r"(?:.*\.)?transformer_1\.")
LOW_EXPERT = re.compile(r"(?:.*\.)?(?:pipe\.(?:dit|vace)2|transformer_2)\.")
FLAT = re.compile(r"lora_unet__?(?P<flat>[^.]+)")
TEXT_ENCODER = re.compile(r"(?:lora_te\d?_|text_encoders?\.|text_encoder_2\.).*")

_ATTENTION = tuple(
    f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in ("q", "k", "v", "o", "norm_q", "norm_k")
)
_IN_BLOCK = (
    *_ATTENTION, "cross_attn.k_img", "cross_attn.v_img", "cross_attn.norm_k_img", "norm3", "ffn.0", "ffn.2",
    "modulation",
)  # fmt: skip
_AROUND = (
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
    "time_projection.1", "head.head", "head.modulation", "img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3",
    "img_emb.proj.4", "vace_patch_embedding", "ref_conv", "control_adapter.conv",
)  # fmt: skip
_SAME_IN_DIFFUSERS = ("patch_embedding", "vace_patch_embedding")
_LARGEST_INDEX = 200  # of a block: files that name a higher one are no LoRAs of a Wan model


def split_prefix(key: str) -> tuple[str, str, Role | None]:
    """Cut what names the network off a key; the role is that of the expert that it names, if it does."""
    found = PREFIX.match(key)
    prefix = found.group() if found else ""
    role: Role | None = "low" if LOW_EXPERT.fullmatch(prefix) else None
    return prefix, key[len(prefix) :], "high" if HIGH_EXPERT.fullmatch(prefix) else role


def official_name(layer: str) -> str:
    """The official name of a layer that has it, or that of diffusers."""
    plan = DIFFUSERS_DIT.plan([f"{layer}.weight"])
    name = next(iter(plan), "")
    if name.endswith(".weight") and name != f"{layer}.weight":
        return name.removesuffix(".weight")
    # A tensor without a layer around it: the modulation of a block.
    name = next(iter(DIFFUSERS_DIT.plan([layer])), "")
    return name or layer


def diffusers_name(layer: str) -> str | None:
    """The name that diffusers gives to an official layer; None when it has none."""
    if layer in _SAME_IN_DIFFUSERS:
        return layer
    inverse = DIFFUSERS_DIT.inverse()
    for name in (f"{layer}.weight", layer):
        plan = inverse.plan([name])
        if len(plan) == 1 and (found := next(iter(plan))) != name and plan[found].chunk == (0, 1):
            return found.removesuffix(".weight")
    return None


def is_diffusers(layer: str) -> bool:
    """Whether a layer goes by a name that only diffusers uses."""
    return official_name(layer) != layer


class FlatNames:
    """Finds the layer behind a flat name.

    Args:
        layers: official names of the layers of the loaded networks, in which it is looked for first.
    """

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self._known = {flat(layer): layer for layer in layers}

    def find(self, name: str) -> str | None:
        """The official name, or None when no Wan network has such a layer."""
        if name in self._known:
            return self._known[name]
        block = re.match(r"(?P<block>(?:vace_)?blocks)_(?P<index>\d{1,3})_(?P<rest>.+)", name)
        if block is None:
            return _around().get(name)
        inside = _in_block(block["block"]).get(block["rest"])
        if inside is None or int(block["index"]) > _LARGEST_INDEX:
            return None
        return f"{block['block']}.{int(block['index'])}.{inside}"


def flat(layer: str) -> str:
    """A name with ``_`` for ``.``."""
    return layer.replace(".", "_")


@cache
def _around() -> dict[str, str]:
    both = {name: name for name in _AROUND}
    both |= {found: name for name in _AROUND if (found := diffusers_name(name)) is not None}
    return {flat(name): official for name, official in both.items()}


@cache
def _in_block(block: str) -> dict[str, str]:
    names = _IN_BLOCK + (("before_proj", "after_proj") if block == "vace_blocks" else ())
    start = f"{block}.0."
    both = {name: name for name in names}
    for name in names:
        if (found := diffusers_name(start + name)) is not None:
            both[found.removeprefix(start)] = name
    return {flat(name): official for name, official in both.items()}

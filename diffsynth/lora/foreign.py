"""LoRAs of other families of models, told by their keys, so that an error can name what a file is for."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A layer of a Wan block, in dotted or flat names: such a file is never of another family.
_OF_WAN = re.compile(
    r"(?:.*\.)?(?:lora_unet__?)?(?:vace_)?blocks[._]\d+[._](?:self_attn|cross_attn|attn[12]|ffn|modulation)(?![a-z])"
)
# The first row with a matching key wins. Sources: kohya's sd-scripts and musubi-tuner, diffusers, ai-toolkit.
FAMILIES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        (
            "Stable Diffusion XL",
            r"lora_te2_.*|text_encoder_2\..*|lora_unet_(?:input|output|middle)_blocks?_.*"
            r"|.*(?:down|up)_blocks[._]\d[._]attentions[._]\d[._]transformer_blocks[._][1-9].*",
        ),
        (
            "Stable Diffusion",
            r"lora_te_text_model_.*|(?:lora_unet_|unet\.|.*\.)?(?:down|up|mid)_blocks?[._].*attentions[._].*",
        ),
        ("Qwen-Image", r"(?:.*[._])?transformer_blocks[._]\d+[._](?:img|txt)_(?:mod|mlp)[._].*"),
        (
            "Flux or HunyuanVideo",
            r"(?:.*[._])?(?:double|single)_blocks[._]\d+[._].*|(?:.*[._])?single_transformer_blocks[._]\d+[._].*",
        ),
        (
            "Stable Diffusion 3",
            r"(?:.*[._])?joint_blocks[._].*|(?:.*[._])?transformer_blocks[._]\d+[._]attn[._].*",
        ),
        ("LTX-Video or CogVideoX", r"(?:.*[._])?transformer_blocks[._]\d+[._]attn[12][._].*"),
    )
)


def foreign_family(keys: Iterable[str]) -> str | None:
    """The family that a LoRA is for, by its keys; None for Wan's, and for one that nobody knows."""
    keys = list(keys)
    if any(_OF_WAN.match(key) for key in keys):
        return None
    return next((name for name, pattern in FAMILIES if any(pattern.fullmatch(key) for key in keys)), None)

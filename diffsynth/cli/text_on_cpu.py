"""``--t5_cpu``: prompts are encoded on the CPU, so that the text encoder takes nothing of the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline


def text_on_cpu(
    pipe: WanVideoPipeline, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, object]]:
    """Return the arguments of `pipe()` with features in place of texts, and the texts for the settings.

    Args:
        pipe: its text encoder rests on the host.
        arguments: of `pipe()`, with texts.

    Raises:
        MissingModelError: without a text encoder.
    """
    from dataclasses import replace

    import torch

    from diffsynth.conditioning.conditioner import read_inputs
    from diffsynth.conditioning.text import TextConditioner, TextInputs
    from diffsynth.pipelines.presets import preset_values
    from diffsynth.pipelines.request import usual_values

    resolved = {**usual_values(pipe.parts), **preset_values(arguments), **arguments}
    if "cfg_scale" in arguments and "cfg_scale_low_noise" not in arguments:
        resolved["cfg_scale_low_noise"] = None  # one scale is meant for both experts
    inputs = read_inputs(TextInputs, {**resolved, "num_videos_per_prompt": 1})
    parts = replace(pipe.parts, device=torch.device("cpu"))
    conditioner = TextConditioner()
    conditioner.applies(inputs, parts)
    positive, negative = conditioner.features(inputs, parts)
    texts = {name: arguments[name] for name in ("prompt", "negative_prompt") if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in (*texts, "cache_text")}
    rest["prompt_embeds"] = positive
    if negative is not None:
        rest["negative_prompt_embeds"] = negative
    return rest, texts

"""What is odd about a call and yet no error: said in one line each, before the work begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from diffsynth.announce import announce
from diffsynth.conditioning.text import TextInputs
from diffsynth.pipelines.presets import PRESETS

if TYPE_CHECKING:
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.pipelines.request import VideoRequest

logger = logging.getLogger("diffsynth")


def make_remarks(request: VideoRequest, parts: PipelineComponents) -> None:
    """Log what a caller may not have meant."""
    text = request.inputs["text"]
    assert isinstance(text, TextInputs)
    prompts = [text.prompt] if isinstance(text.prompt, str) else (text.prompt or ())
    if text.prompt_embeds is None and not all(prompt.strip() for prompt in prompts):
        logger.warning("The prompt is empty: the model shows whatever it likes.")
    if text.negative_prompt and not text.is_guided:
        announce("negative_prompt is not read: cfg_scale is 1, which is no guidance.")
    if request.options.preset is not None:
        _check_few_steps(str(request.options.preset), parts)


def _check_few_steps(preset: str, parts: PipelineComponents) -> None:
    """Warn of an ordinary model with the settings of a step-distilled one.

    It is a warning, because a distilled checkpoint may have any name.
    """
    experts = {"dit": parts.high, "dit_low_noise": parts.low}
    plain = [
        parts.sources.get(name, name)
        for name, expert in experts.items()
        if expert is not None and name not in parts.few_step and not parts.loras.act_on(expert.dit)
    ]
    row = PRESETS[preset]
    if plain:
        logger.warning(
            "preset %s is for a step-distilled model, and nothing says that %s is one: no LoRA is loaded for "
            "it, and neither its name nor its metadata tells. An ordinary model makes blur of %d steps "
            "without guidance. Load the LoRA of the preset, or leave the preset out.",
            preset, " and ".join(plain), row.num_inference_steps,
        )  # fmt: skip
    if row.num_high_steps is not None and parts.low is None:
        logger.warning(
            "preset %s shares its %d steps between two experts, and one DiT is loaded: it makes all of them.",
            preset, row.num_inference_steps,
        )  # fmt: skip

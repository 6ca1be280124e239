"""The names of DiffSynth-Studio 1.1.8 and 1.1.9: the one pipeline of this package, made of `ModelConfig`s."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names
from diffsynth.pipelines.model_config import ModelConfig
from diffsynth.pipelines.wan_video import WanVideoPipeline

if not TYPE_CHECKING:
    _UNITS = (
        "a call goes through conditioners here, not units; docs/add_a_variant.md shows how an input or a "
        "network of your own is added."
    )
    __getattr__ = lazy_names(
        __name__,
        {},
        {
            "WanVideoUnit_S2V": "Wan2.2-S2V-14B (speech to video) is not run by this version.",
            "WanVideoPostUnit_S2V": "Wan2.2-S2V-14B (speech to video) is not run by this version.",
            "WanVideoPostUnit_Animate": "Wan2.2-Animate-14B is not run by this version.",
            "WanVideoUnit": _UNITS,
            "WanVideoPostUnit": _UNITS,
            "PipelineUnit": _UNITS,
            "model_fn_wan_video": "call pipe.dit(latents, timestep, [pipe.dit.prepare(conditions)]).",
            "TeaCache": "step caches by name are not in this version; step_cache= takes an object.",
        },
    )

__all__ = ["ModelConfig", "WanVideoPipeline"]

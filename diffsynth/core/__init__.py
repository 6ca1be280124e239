"""Where DiffSynth-Studio 2.x has `ModelConfig` and `load_state_dict`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names

if TYPE_CHECKING:
    from diffsynth.checkpoints.state_dict import load_state_dict
    from diffsynth.pipelines.model_config import ModelConfig
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "ModelConfig": "diffsynth.pipelines.model_config",
            "load_state_dict": "diffsynth.checkpoints.state_dict",
        },
    )

__all__ = ["ModelConfig", "load_state_dict"]

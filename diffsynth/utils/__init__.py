"""Where DiffSynth-Studio 1.1.8 and 2.x have `ModelConfig` and what reads and writes videos."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names

if TYPE_CHECKING:
    from diffsynth.pipelines.model_config import ModelConfig
else:
    __getattr__ = lazy_names(__name__, {"ModelConfig": "diffsynth.pipelines.model_config"})

__all__ = ["ModelConfig"]

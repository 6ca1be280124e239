"""Inputs in, videos out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline
else:
    __getattr__ = lazy_names(__name__, {"WanVideoPipeline": "diffsynth.pipelines.wan_video"})

__all__ = ["WanVideoPipeline"]

"""Video diffusion with the Wan models: the public names, each loaded when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth.models.model_manager import ModelManager
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from diffsynth.video import VideoData, VideoWriter, read_metadata, save_frames, save_image, save_video

__version__ = "0.1.0"

_HOMES = {
    "ModelManager": "diffsynth.models.model_manager",
    "WanVideoPipeline": "diffsynth.pipelines.wan_video",
    "VideoData": "diffsynth.video",
    "VideoWriter": "diffsynth.video",
    "download_customized_models": "diffsynth.models.download",
    "download_models": "diffsynth.models.download",
    "read_metadata": "diffsynth.video",
    "save_frames": "diffsynth.video",
    "save_image": "diffsynth.video",
    "save_video": "diffsynth.video",
}

__all__ = [
    "ModelManager", "VideoData", "VideoWriter", "WanVideoPipeline", "download_customized_models",
    "download_models", "read_metadata", "save_frames", "save_image", "save_video",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffsynth' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

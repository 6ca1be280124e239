"""Video diffusion with the Wan models: the public names, each loaded when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names

if TYPE_CHECKING:
    from diffsynth.checkpoints.state_dict import load_state_dict
    from diffsynth.models.download import download_customized_models, download_models
    from diffsynth.models.model_manager import ModelManager
    from diffsynth.pipelines.model_config import ModelConfig
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from diffsynth.video import VideoData, VideoWriter, read_metadata, save_frames, save_image, save_video

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "diffsynth.pipelines.model_config",
    "ModelManager": "diffsynth.models.model_manager",
    "WanVideoPipeline": "diffsynth.pipelines.wan_video",
    "VideoData": "diffsynth.video",
    "VideoWriter": "diffsynth.video",
    "download_customized_models": "diffsynth.models.download",
    "download_models": "diffsynth.models.download",
    "load_state_dict": "diffsynth.checkpoints.state_dict",
    "read_metadata": "diffsynth.video",
    "save_frames": "diffsynth.video",
    "save_image": "diffsynth.video",
    "save_video": "diffsynth.video",
}

__all__ = [
    "ModelConfig", "ModelManager", "VideoData", "VideoWriter", "WanVideoPipeline",
    "download_customized_models", "download_models", "load_state_dict", "read_metadata",
    "save_frames", "save_image", "save_video",
]  # fmt: skip


_NO_SOUND = "this version reads and writes no sound; speech to video (Wan2.2-S2V-14B) is not built."
_MISSING = {"save_video_with_audio": _NO_SOUND, "merge_video_audio": _NO_SOUND}
if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, _HOMES, _MISSING)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

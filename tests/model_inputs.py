"""Two ways to give each input of the models table, in any size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FRAMES = 5
ALONE = "input_video"  # a video to start from and references in front of the latents exclude each other
# what means nothing without another
COMPANIONS = {"end_image": "input_image", "vace_video_mask": "vace_video"}


def given(names: Iterable[str], height: int, width: int, way: int = 0) -> dict[str, Any]:
    """Arguments of these inputs, each in its first or its second way."""
    arguments: dict[str, Any] = {}
    for name in names:
        arguments |= _values(name, height, width, way)
    return arguments


def companions(name: str, height: int, width: int) -> dict[str, Any]:
    """Arguments of the inputs without which this one means nothing."""
    return given([COMPANIONS[name]] if name in COMPANIONS else [], height, width)


def _values(name: str, height: int, width: int, way: int) -> dict[str, Any]:
    picture, video = _drawn(way, 3, height, width), _drawn(way, FRAMES, 3, height, width)
    side = torch.zeros(FRAMES, 1, height, width)
    side[..., : width // 2] = 1.0
    return {
        "camera_control_direction": {
            "camera_control_direction": ("Left", "Up")[way], "camera_control_speed": 0.2,
        },
        "motion_bucket_id": {"motion_bucket_id": (10, 90)[way]},
        "vace_video_mask": {"vace_video_mask": (side, 1 - side)[way]},
        "input_video": {"input_video": video, "denoising_strength": 0.6},
    }.get(name, {name: video if name.endswith("video") else picture})  # fmt: skip


def _drawn(way: int, *shape: int) -> Tensor:
    """Real numbers in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(way + 1))

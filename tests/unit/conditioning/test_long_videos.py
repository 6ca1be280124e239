"""Of a video that is encoded, only the frames of a chunk are held, whatever reads it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diffsynth.conditioning.clips import lazy_clip
from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.control import ControlConditioner, ControlInputs
from diffsynth.conditioning.vace import VaceConditioner, VaceInputs, frames_shown
from diffsynth.conditioning.video import VideoConditioner, VideoInputs
from diffsynth.models.toy import VAE
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.pipelines.components import PipelineComponents

NUM_FRAMES = 41
GEOMETRY = Geometry(
    num_videos=1, num_frames=NUM_FRAMES, height=16, width=16, latent_channels=16, latent_frames=11,
    latent_height=2, latent_width=2,
)  # fmt: skip


class Recorded:
    """Frames that are made when they are asked for; counts how many live at once."""

    def __init__(self) -> None:
        self.live = self.most = 0

    def __len__(self) -> int:
        return NUM_FRAMES

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        for index in range(NUM_FRAMES):
            frame = np.full((16, 16, 3), index, np.uint8)
            self.live += 1
            self.most = max(self.most, self.live)
            weakref.finalize(frame, self.end_one)
            yield frame
            del frame

    def end_one(self) -> None:
        self.live -= 1


class FramesOfAChunk(WanVideoVAE):
    """Remembers the longest chunk that came to the encoder."""

    longest = 0

    def _ready(self, chunk: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, chunk.shape[2])
        return super()._ready(chunk)


@pytest.fixture
def parts() -> PipelineComponents:
    torch.manual_seed(0)
    vae = FramesOfAChunk.from_config(VAE).eval()
    return PipelineComponents(device=torch.device("cpu"), dtype=torch.float32, vae=vae)


@pytest.mark.parametrize(
    ("conditioner", "inputs"),
    [
        (VideoConditioner(), lambda video: VideoInputs(input_video=video)),
        (ControlConditioner(), lambda video: ControlInputs(control_video=video)),
        (VaceConditioner(), lambda video: VaceInputs(vace_video=video, vace_video_mask=video)),
    ],
    ids=["input_video", "control_video", "vace_video"],
)
def test_only_a_chunk_of_a_video_is_held(conditioner: Any, inputs: Any, parts: PipelineComponents) -> None:
    video = Recorded()
    conditioner.encode(inputs(video), GEOMETRY, parts)
    assert parts.vae is not None and parts.vae.longest == 4
    assert video.most <= 4  # of VACE, of video and mask together


def test_a_video_read_lazily_gives_the_latents_of_the_whole(parts: PipelineComponents) -> None:
    clip = lazy_clip(Recorded(), GEOMETRY, name="input_video", fit=None)
    tiles: dict[str, Any] = {"tile_size": (1, 2), "tile_stride": (1, 1)}
    for more in ({}, tiles):
        assert torch.equal(parts.encode_video(clip, **more), parts.encode_video(clip.whole(), **more))


@pytest.mark.parametrize("num_frames", [1, 5, 81, 401])
def test_the_frames_of_a_mask_are_those_of_nearest_exact(num_frames: int) -> None:
    num_latents = (num_frames - 1) // 4 + 1
    numbers = torch.arange(float(num_frames))[None, None]
    shown = torch.nn.functional.interpolate(numbers, size=num_latents, mode="nearest-exact")
    assert frames_shown(num_frames, num_latents) == shown.flatten().int().tolist()

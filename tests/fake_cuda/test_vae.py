"""The VAE at full size: what a plan promises, and what happens on cards that are too small."""

from __future__ import annotations

import ctypes
import logging
import resource
import sys
from pathlib import Path

import pytest
import torch

from diffsynth.cli import doctor
from diffsynth.conditioning.clips import lazy_clip
from diffsynth.conditioning.conditioner import Geometry
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.models.wan.vae22 import WanVideoVAE22
from diffsynth.models.wan.vae_coding import CausalVAE
from diffsynth.ops import convolution
from diffsynth.pipelines.decoding import VideoDecoder
from diffsynth.pipelines.rungs import Tiling
from diffsynth.pipelines.vae_encoding import VideoEncoder
from diffsynth.video import VideoData, save_video
from diffsynth.vram_management.plan import layers_of_module, plan_memory
from tests.fake_cuda import controls

CUDA = torch.device("cuda", 0)
GIB = controls.GIB


def with_weights_of_nothing(kind: type[WanVideoVAE | WanVideoVAE22]) -> CausalVAE:
    """A released VAE in bfloat16."""
    controls.copies_move_bytes(False)
    with torch.device("meta"):
        made = kind.from_config({}).to(torch.bfloat16)
    return made.to_empty(device=CUDA).eval().requires_grad_(False)


@pytest.fixture
def vae() -> CausalVAE:
    """That of Wan2.1."""
    return with_weights_of_nothing(WanVideoVAE)


def host_video(num_frames: int, height: int, width: int) -> torch.Tensor:
    """Takes no memory: nothing writes to it."""
    return torch.empty(1, 3, num_frames, height, width)


@pytest.mark.parametrize(("limit", "is_tiled"), [(6, False), (5, True)])
def test_an_encode_stays_within_the_limit_that_its_plan_was_given(
    vae: CausalVAE, limit: float, is_tiled: bool
) -> None:
    plan = plan_memory(
        layers_of_module("vae", vae), dit=None, height=720, width=1280, num_frames=81, vram_limit_gib=limit
    )
    assert plan.tiled_vae and plan.tiled_encode == is_tiled
    torch.cuda.reset_peak_memory_stats()
    encoder = VideoEncoder(vae=vae, device=CUDA, tiling=Tiling(), tiled_by_plan=plan.tiled_encode)
    latents = encoder.latents(host_video(9, 720, 1280))
    assert latents.shape == (1, 16, 3, 90, 160)
    planned = next(phase.peak_bytes for phase in plan.phases if phase.name == "encode")
    assert torch.cuda.max_memory_allocated() < planned <= limit * GIB


def test_an_encode_goes_on_in_tiles_where_the_card_is_too_small(
    vae: CausalVAE, caplog: pytest.LogCaptureFixture
) -> None:
    controls.device_memory(2 * GIB)
    encoder = VideoEncoder(vae=vae, device=CUDA, tiling=Tiling())
    with caplog.at_level(logging.WARNING, logger="diffsynth"):
        latents = encoder.latents(host_video(9, 480, 832))
    assert latents.shape == (1, 16, 3, 60, 104)
    assert "while encoding the whole picture" in caplog.text and "tiles" in caplog.text


def test_memory_does_not_grow_with_the_length_of_a_video(vae: CausalVAE) -> None:
    peaks = []
    for num_frames in (13, 29):
        torch.cuda.reset_peak_memory_stats()
        vae.encode(host_video(num_frames, 240, 416))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] < 2 << 20  # latents alone


def test_a_cudnn_that_torch_leaves_out_is_told_by_the_first_encode_or_decode(
    vae: CausalVAE, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    encoder = VideoEncoder(vae=vae, device=CUDA, tiling=Tiling())
    decoder = VideoDecoder(vae=vae, device=CUDA, tiling=Tiling())
    latents = torch.empty(1, 16, 1, 8, 8, device=CUDA)
    for work in (lambda: encoder.latents(host_video(1, 64, 64)), lambda: list(decoder.frames(latents))):
        convolution._warn.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="diffsynth"):
            for _ in range(2):
                work()
        assert [record.getMessage().partition(" computes")[0] for record in caplog.records] == [
            "torch 2.10.0+cu128 with cuDNN 9.10.2"
        ]
    [found] = [finding for finding in doctor._gpus("PyTorch") if finding.name == "cuDNN"]
    assert found.found.startswith("9.10.2") and ">=9.15'" in found.remedy


@torch.no_grad()
def test_81_frames_of_480p_take_less_than_4_gb(vae: CausalVAE) -> None:
    torch.cuda.reset_peak_memory_stats()
    for chunk in vae.decode_stream(torch.empty(1, 16, 21, 60, 104, device=CUDA)):
        del chunk
    vae.encode(host_video(81, 480, 832))
    assert torch.cuda.max_memory_allocated() < 4e9


@pytest.mark.parametrize("kind", [WanVideoVAE, WanVideoVAE22])
@torch.no_grad()
def test_every_convolution_runs_channels_last(kind: type[WanVideoVAE | WanVideoVAE22]) -> None:
    vae = with_weights_of_nothing(kind)
    from tests.fake_cuda import answers  # outside of the simulated runtime it would answer for a real GPU

    answers.convolutions.clear()
    vae.encode(host_video(9, 64, 96))
    vae.decode(torch.empty(1, vae.z_dim, 3, 4, 6, device=CUDA))
    assert len(answers.convolutions) > 200
    assert not [shapes for *shapes, is_last in answers.convolutions if not is_last]


def free_memory_goes_back() -> None:
    """Let glibc give freed pictures back at once: else it learns to keep them, and RSS tells of that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def host_peak_mib() -> float:
    """Of this process, ever: the most host memory that was in use at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)


def peaks_of_1080p(vae: CausalVAE, num_frames: int, folder: Path) -> tuple[float, float]:
    """MiB of host and device: latents into a video file, and that file into latents."""
    torch.cuda.reset_peak_memory_stats()
    path, num_latents = folder / f"{num_frames}.mp4", (num_frames - 1) // 4 + 1
    latents = torch.empty(1, 16, num_latents, 136, 240, device=CUDA)
    frames = VideoDecoder(vae=vae, device=CUDA, tiling=Tiling(False)).frames(latents)
    save_video(frames, path, crf=40, ffmpeg_params=["-preset", "ultrafast"])
    geometry = Geometry(
        num_videos=1, num_frames=num_frames, height=1088, width=1920, latent_channels=16,
        latent_frames=num_latents, latent_height=136, latent_width=240,
    )  # fmt: skip
    clip = lazy_clip(VideoData(path), geometry, name="input_video", fit=None)
    encoded = VideoEncoder(vae=vae, device=CUDA, tiling=Tiling(False)).latents(clip)
    assert encoded.shape == latents.shape
    return host_peak_mib(), torch.cuda.max_memory_allocated() / 2**20


@pytest.mark.slow
def test_401_frames_of_1080p_take_the_memory_of_101(vae: CausalVAE, tmp_path: Path) -> None:
    free_memory_goes_back()
    (host, device), (host_of_long, device_of_long) = (peaks_of_1080p(vae, n, tmp_path) for n in (101, 401))
    latents_mib = 75 * 16 * 136 * 240 * 4 / 2**20  # of the frames that there are more
    # on the device normalised ones, and chunks and their sum; a frame held on the host would be 6 MiB each
    assert device_of_long - device < 4 * latents_mib
    assert host_of_long - host < 200


LADDER = [  # GiB of the card, and how often at least the decode and the encode of 480P step down
    pytest.param(4, 0, 0, marks=pytest.mark.slow), pytest.param(3, 1, 0),
    pytest.param(2, 1, 1, marks=pytest.mark.slow), pytest.param(1, 2, 1, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("card", "decode_steps", "encode_steps"), LADDER)
def test_a_card_of_few_gib_decodes_and_encodes_480p(
    card: int, decode_steps: int, encode_steps: int, vae: CausalVAE, caplog: pytest.LogCaptureFixture
) -> None:
    controls.device_memory(card * GIB)
    torch.cuda.reset_peak_memory_stats()
    with caplog.at_level(logging.WARNING, logger="diffsynth"):
        decoder = VideoDecoder(vae=vae, device=CUDA, tiling=Tiling())
        latents = torch.empty(1, 16, 3, 60, 104, device=CUDA)
        # Tensors: pictures are looked through for NaN, and here they hold anything.
        assert decoder.videos(latents, "pt", is_batch=False).shape == (1, 9, 3, 480, 832)
        assert caplog.text.count("while decoding") >= decode_steps
        encoder = VideoEncoder(vae=vae, device=CUDA, tiling=Tiling())
        assert encoder.latents(host_video(9, 480, 832)).shape == (1, 16, 3, 60, 104)
        assert caplog.text.count("while encoding") >= encode_steps
    assert "on the CPU" not in caplog.text
    assert torch.cuda.max_memory_allocated() <= card * GIB

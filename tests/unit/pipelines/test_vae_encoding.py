"""A video is encoded as a whole where that fits, else in tiles; its frames may lie anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.models.toy import toy_files
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.pipelines.rungs import Tiling
from diffsynth.pipelines.vae_encoding import VideoEncoder
from diffsynth.pipelines.wan_video import WanVideoPipeline

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TILES: dict[str, Any] = {"tile_size": (3, 4), "tile_stride": (2, 2)}


class ShortOfMemory(WanVideoVAE):
    """An encode whose input is larger than ``most`` pixels on a side fails."""

    most = 64

    def _encode_chunks(self, video: Tensor, chunk_frames: int) -> Any:
        if max(video.shape[3:]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super()._encode_chunks(video, chunk_frames)


@pytest.fixture(scope="module")
def vae() -> ShortOfMemory:
    torch.manual_seed(0)
    return ShortOfMemory.from_config({"dim": 8}).eval()


@pytest.fixture
def video() -> Tensor:
    return torch.rand(1, 3, 5, 40, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def encoder(vae: WanVideoVAE, tiling: Tiling, **more: Any) -> VideoEncoder:
    return VideoEncoder(vae=vae, device=CPU, tiling=tiling, **more)


def test_what_fits_is_encoded_as_a_whole(vae: ShortOfMemory, video: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(encoder(vae, Tiling()).latents(video), vae.encode(video))


def test_what_does_not_fit_is_encoded_in_tiles(vae, video, monkeypatch, caplog) -> None:
    with torch.no_grad():
        tiled = vae.encode(video, **TILES)
    monkeypatch.setattr(vae, "most", 39)
    assert torch.equal(encoder(vae, Tiling(None, **TILES)).latents(video), tiled)
    assert "while encoding the whole picture (CUDA out of memory); encoding tiles of 3 x 4" in caplog.text


def test_a_plan_that_asks_for_tiles_is_followed(vae, video, caplog) -> None:
    with torch.no_grad():
        tiled = vae.encode(video, **TILES)
    planned = encoder(vae, Tiling(None, **TILES), tiled_by_plan=True)
    assert torch.equal(planned.latents(video), tiled) and not caplog.records


def test_untiled_means_untiled(vae, video, monkeypatch) -> None:
    monkeypatch.setattr(vae, "most", 39)
    with pytest.raises(torch.OutOfMemoryError, match=r"while encoding .* tiled=False asked for nothing else"):
        encoder(vae, Tiling(False), tiled_by_plan=True).latents(video)


def test_bytes_are_encoded_as_the_numbers_that_they_mean(vae: ShortOfMemory) -> None:
    levels = torch.randint(0, 256, (5, 40, 48, 3), dtype=torch.uint8).permute(3, 0, 1, 2)[None]
    pixels = levels.contiguous().to(torch.float32).div_(127.5).sub_(1.0)
    with torch.no_grad():
        for tiles in ({}, TILES):
            assert torch.equal(vae.encode(levels, **tiles), vae.encode(pixels, **tiles))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("i2v", "input_image"),
        ("vace", "vace_video"),
        ("reference", "reference_image"),
        ("t2v", "input_video"),
    ],
)
def test_every_encode_of_a_call_obeys_the_plan(
    kind: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_files(kind), torch_dtype=torch.float32, device="cpu")
    pipe.parts.tiled_by_plan = True
    sizes = []
    encode = type(pipe.parts.vae).encode

    def noted(self: Any, video: Tensor, **tiles: Any) -> Tensor:
        sizes.append(tiles["tile_size"])
        return encode(self, video, **tiles)

    monkeypatch.setattr(type(pipe.parts.vae), "encode", noted)
    frames, picture = torch.rand(5, 3, 240, 416), torch.rand(3, 240, 416)
    call: dict[str, Any] = {given: picture if given.endswith("image") else frames}
    if kind == "reference":
        call["control_video"] = frames
    if given == "input_video":
        call["denoising_strength"] = 0.5
    pipe(
        prompt="a", height=240, width=416 + 32, num_frames=5, num_inference_steps=2, cfg_scale=1.0,
        output_type="latent", progress_bar_cmd=iter, **call,
    )  # fmt: skip
    assert sizes and set(sizes) == {(30, 52)}


def test_a_reference_is_encoded_whole_also_in_a_call_in_tiles() -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_files("reference"), torch_dtype=torch.float32, device="cpu")
    assert pipe.parts.vae is not None
    picture = torch.rand(1, 3, 1, 32, 48)
    pipe.parts.tiled = True
    with torch.no_grad():
        assert torch.equal(pipe.parts.encode_video(picture), pipe.parts.vae.encode(picture))

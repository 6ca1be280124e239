"""The Wan2.2 VAE: its shortcuts, patches, chunks, tiles and file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.layouts import DIFFUSERS_VAE22
from diffsynth.errors import ArgumentError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.wan.vae22 import (
    VAE22Config,
    WanVideoVAE22,
    add_repeated,
    mean_of_neighbours,
    patches,
    pixels,
)
from tests.unit.checkpoints.weights import manifests


@pytest.fixture(scope="module")
def vae() -> WanVideoVAE22:
    torch.manual_seed(0)
    return WanVideoVAE22(VAE22Config(dim=8, dec_dim=8, num_res_blocks=1)).requires_grad_(False)


def test_the_released_file_fits_name_by_name() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in WanVideoVAE22().state_dict().items()}
    assert shapes == manifests()["wan2.2_vae"]


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_sizes_are_told_by_the_file(layout: str, tmp_path: Path) -> None:
    config = VAE22Config(
        dim=12, dec_dim=16, num_res_blocks=1, dim_mult=(1, 2, 2, 4), temporal_downsample=(True, False, True)
    )
    ours = WanVideoVAE22(config)
    file = tmp_path / "vae.safetensors"
    save_file(ours.state_dict(), file)
    if layout == "diffusers":
        theirs = Checkpoint.open(file).renamed(DIFFUSERS_VAE22.inverse())
        assert "decoder.up_blocks.0.upsampler.resample.1.weight" in theirs
        save_file({name: theirs.tensor(name).clone() for name in theirs.shapes}, file)
    [match] = detect(Checkpoint.open(file), ARCHITECTURES)
    assert {name: match.config[name] for name in ("dim", "dec_dim", "num_res_blocks", "dim_mult")} == {
        "dim": 12, "dec_dim": 16, "num_res_blocks": 1, "dim_mult": (1, 2, 2, 4),
    }  # fmt: skip
    loaded = ModelManager(torch_dtype=None, device="cpu").load_models([file]).fetch_model("wan_video_vae")
    assert isinstance(loaded, WanVideoVAE22) and loaded.config == config
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_a_patch_becomes_channels_columns_before_rows() -> None:
    # a picture whose value tells colour, row and column
    colour, row, column = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij")
    video = (100 * colour + 10 * row + column)[None, :, None].float()
    packed = patches(video)
    assert packed[0, :, 0, 1, 2].tolist() == [
        100 * c + 10 * (2 + q) + 4 + r for c in range(3) for r in range(2) for q in range(2)
    ]
    assert torch.equal(pixels(packed), video)


def test_halving_takes_means_of_2_x_2_and_puts_frames_into_channels() -> None:
    x = torch.randn(2, 3, 4, 4, 6)
    made = mean_of_neighbours(x, 6, frames=2, edge=2)
    means = torch.nn.functional.avg_pool3d(x, (1, 2, 2))
    for channel in range(3):
        for frame in range(2):
            torch.testing.assert_close(made[:, 2 * channel + frame], means[:, channel, frame::2])


def test_the_first_frame_is_averaged_with_a_frame_of_zeros() -> None:
    x = torch.randn(1, 4, 5, 2, 2)
    whole = mean_of_neighbours(x, 4, frames=2, edge=2)
    chunks = [mean_of_neighbours(part, 4, frames=2, edge=2) for part in (x[:, :, :1], x[:, :, 1:])]
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole)
    torch.testing.assert_close(whole[:, :, 0], x[:, :, 0].mean((-2, -1), keepdim=True) / 2)


@pytest.mark.parametrize(("channels", "frames"), [(3, 2), (6, 1)], ids=["as-wide-twice-as-long", "wider"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first-chunk", "later-chunk"])
def test_doubling_adds_the_repeated_input(channels: int, frames: int, is_first: bool) -> None:
    x = torch.randn(2, channels, 3, 2, 3)
    repeats = 3 * frames * 4 // channels
    told = x.repeat_interleave(repeats, dim=1).view(2, 3, frames, 2, 2, 3, 2, 3)
    expected = told.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(2, 3, 3 * frames, 4, 6)
    expected = expected[:, :, frames - 1 :] if is_first else expected
    made = add_repeated(torch.zeros_like(expected), x, frames=frames, is_first=is_first)
    assert torch.equal(made, expected)


def test_a_frame_does_not_see_later_frames(vae: WanVideoVAE22) -> None:
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    later = video.clone()
    later[:, :, 5:] = 0
    assert torch.equal(vae.encode(video)[:, :, :2], vae.encode(later)[:, :, :2])
    latents = torch.randn(1, 48, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 2] = 0
    assert torch.equal(vae.decode(latents)[:, :, :5], vae.decode(changed)[:, :, :5])


def test_streamed_chunks_join_to_the_whole(vae: WanVideoVAE22) -> None:
    latents = torch.randn(1, 48, 4, 2, 2)
    chunks = list(vae.decode_stream(latents))
    assert [tuple(c.shape[2:]) for c in chunks] == [(1, 32, 32), *[(4, 32, 32)] * 3]
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latents))


def test_training_and_inference_paths_agree(vae: WanVideoVAE22) -> None:
    latents = torch.randn(2, 48, 3, 2, 3)
    made = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            made.append(vae.decode(latents.clone().requires_grad_(grad), chunk_latents=3))
    assert made[0].requires_grad
    # sums of a doubled pixel's taps in another order
    torch.testing.assert_close(made[0].detach(), made[1], atol=2e-5, rtol=1e-4)


def test_a_tile_as_large_as_the_picture_changes_nothing(vae: WanVideoVAE22) -> None:
    latents, video = torch.randn(1, 48, 2, 3, 4), torch.rand(1, 3, 5, 48, 64) * 2 - 1
    whole = vae.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(vae.decode(latents, tile_size=(3, 4)), whole)
    torch.testing.assert_close(vae.encode(video, tile_size=(3, 4)), vae.encode(video))
    tiled = vae.decode(latents, tile_size=(2, 2), tile_stride=(1, 1))
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)


def test_what_does_not_fit_is_refused(vae: WanVideoVAE22) -> None:
    with pytest.raises(ArgumentError, match="multiples of 16"):
        vae.encode(torch.zeros(1, 3, 5, 24, 32))
    with pytest.raises(ArgumentError, match=r"expected \(B, 48, T, h, w\)"):
        vae.decode(torch.zeros(1, 16, 2, 4, 4))
    with pytest.raises(ArgumentError, match=r"z_dim is 16, .* WanVideoVAE22 are normalised with 48"):
        WanVideoVAE22(VAE22Config(dim=8, dec_dim=8, z_dim=16))

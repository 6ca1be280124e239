"""The VAE's chunks, layers and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffsynth.errors import ArgumentError
from diffsynth.models.wan import vae_layers
from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE
from diffsynth.models.wan.vae_layers import CausalConv3d, RMSNorm, convolve_doubled


@pytest.fixture(scope="module")
def vae() -> WanVideoVAE:
    torch.manual_seed(0)
    return WanVideoVAE(VAEConfig(dim=8, num_res_blocks=1)).requires_grad_(False)


def test_a_frame_does_not_see_later_frames(vae: WanVideoVAE) -> None:
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    later = video.clone()
    later[:, :, 5:] = 0
    with torch.no_grad():
        assert torch.equal(vae.encode(video)[:, :, :2], vae.encode(later)[:, :, :2])
        latents = torch.randn(1, 16, 3, 2, 2)
        changed = latents.clone()
        changed[:, :, 2] = 0
        assert torch.equal(vae.decode(latents)[:, :, :5], vae.decode(changed)[:, :, :5])


def test_training_and_inference_paths_agree(vae: WanVideoVAE) -> None:
    latents = torch.randn(2, 16, 3, 2, 4)
    made = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            made.append(vae.decode(latents, chunk_latents=3))
    torch.testing.assert_close(made[0], made[1], atol=2e-5, rtol=1e-4)


def test_streamed_chunks_join_to_the_whole(vae: WanVideoVAE) -> None:
    latents = torch.randn(1, 16, 4, 2, 2)
    with torch.no_grad():
        chunks = list(vae.decode_stream(latents))
        assert [c.shape[2] for c in chunks] == [1, 4, 4, 4]
        assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upsampling_in_four_phases_equals_repeating_and_convolving(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 6, 5, 7), torch.randn(4, 6, 3, 3), torch.randn(4)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), weight, bias, padding=1)
    made = convolve_doubled(x.to(dtype), weight.to(dtype), bias.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # 8 bits of mantissa in sums of 54 products of size 1
    torch.testing.assert_close(made.float(), expected, atol=tolerance, rtol=1e-2)


def test_a_small_convolution_of_one_sample_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    conv, x = CausalConv3d(5, 7, 3), torch.randn(1, 5, 4, 6, 8, requires_grad=True)
    assert x.shape[1:4].numel() <= vae_layers.ONEDNN_FROM  # else PyTorch takes that way by itself
    plain = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=(0, 1, 1))
    made = conv(x)
    torch.testing.assert_close(made.double(), plain, rtol=0, atol=1e-6)  # sums of 135 products in float32
    weights = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weights).sum(), (x, conv.weight))
    for grad, own in zip(wanted, torch.autograd.grad((made * weights).sum(), (x, conv.weight)), strict=True):
        torch.testing.assert_close(own, grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_in_pieces_equals_the_formula_and_spares_its_input(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_layers, "PIECE_BYTES", 4 * 8 * 10)
    norm = RMSNorm(8)
    norm.gamma.data = torch.randn(8, 1, 1, 1)
    x = torch.randn(1, 8, 3, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    before = x.clone()
    expected = F.silu(F.normalize(x.float(), dim=1) * 8**0.5 * norm.gamma)
    with torch.no_grad():
        made = norm(x, torch.nn.SiLU())
    assert torch.equal(x, before)
    torch.testing.assert_close(
        made.float(), expected, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize("has_kernel", [True, False], ids=["torch-2.9", "earlier"])
def test_the_norm_of_a_gpu_equals_the_formula(has_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_layers, "HAS_RMS_KERNEL", has_kernel)
    vectors, gamma = torch.randn(3, 5, 8), torch.randn(8)
    vectors[0, 0] = 0.0
    out = torch.full_like(vectors, torch.nan)
    vae_layers.normalise_whole(vectors, out, gamma, True)
    expected = F.silu(F.normalize(vectors, dim=-1) * 8**0.5 * gamma)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 8, 16, 16), "Cut it to 5"),
        ((1, 3, 5, 12, 16), "multiples of 8"),
        ((1, 4, 5, 16, 16), "expected"),
    ],
)
def test_videos_that_do_not_fit_are_refused(shape: tuple[int, ...], words: str, vae: WanVideoVAE) -> None:
    with pytest.raises(ArgumentError, match=words):
        vae.encode(torch.zeros(shape))


def test_latents_of_another_vae_are_refused(vae: WanVideoVAE) -> None:
    with pytest.raises(ArgumentError, match=r"expected \(B, 16, T, h, w\)"):
        vae.decode(torch.zeros(1, 48, 2, 4, 4))

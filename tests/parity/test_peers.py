"""Networks equal diffusers' and transformers' at toy size, with the same weights through the rename maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.model_manager import ModelManager

# dtype, tolerance relative to the largest value, and the reason for it
PARITY = [
    pytest.param(torch.float32, 1e-5, id="fp32-same-terms-in-another-order"),
    # Both round to 8 bits of mantissa, the peer after every operation, we once per fused step.
    pytest.param(torch.bfloat16, 2e-2, id="bf16-8-bit-mantissa"),
]


def _shake(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that matters: training starts some at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=generator)
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(1 + 0.1 * noise if p.ndim == 1 and p.mean() > 0.5 else noise / max(fan_in, 16) ** 0.5)
    return network


def _ours(peer: nn.Module, config: str, dtype: torch.dtype, folder: Path, name: str) -> nn.Module:
    """Write the peer's weights in its own layout and load them by ModelManager."""
    tensors = {k: v.detach().clone().contiguous() for k, v in peer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    network = (
        ModelManager(torch_dtype=dtype, device="cpu")
        .load_models([folder / "model.safetensors"])
        .fetch_model(name)
    )
    assert network is not None
    return network


def _assert_close(ours: Tensor, peer: Tensor, tolerance: float) -> None:
    """float32 by the largest error; bfloat16, whose single values scatter, by the root of the mean square."""
    error, size = (ours.float() - peer.float()).abs(), peer.float().abs()
    if peer.dtype == torch.float32:
        relative = error.max() / size.max()
    else:
        relative = error.square().mean().sqrt() / size.square().mean().sqrt()
    assert relative <= tolerance, f"relative error {relative:.2e} is above {tolerance}"


@pytest.mark.parametrize(("dtype", "tolerance"), PARITY)
@pytest.mark.parametrize("batch", [1, 2])
def test_dit_equals_diffusers(dtype: torch.dtype, tolerance: float, batch: int, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    peer = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=48,
        freq_dim=64,
        ffn_dim=160,
        num_layers=3,
    )
    _shake(peer)
    dit = _ours(peer, peer.to_json_string(), dtype, tmp_path, "wan_video_dit")
    latents, text = torch.randn(batch, 16, 3, 4, 6), torch.randn(batch, 11, 48)
    timestep = torch.tensor([900, 40][:batch])
    with torch.no_grad():
        [velocity] = dit(latents, timestep, [dit.prepare(Conditions(text=text))])
        padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - 11))
        expected = peer.to(dtype)(latents.to(dtype), timestep, padded.to(dtype)).sample
    _assert_close(velocity, expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PARITY)
def test_vae_equals_diffusers(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    peer = _shake(AutoencoderKLWan(base_dim=16, num_res_blocks=2)).eval()
    vae = _ours(peer, peer.to_json_string(), dtype, tmp_path, "wan_video_vae")
    video, latents = torch.rand(1, 3, 9, 32, 48) * 2 - 1, torch.randn(1, 16, 3, 4, 6)
    with torch.no_grad():
        peer = peer.to(dtype)
        _assert_close(
            vae.encode(video, normalise=False), peer.encode(video.to(dtype)).latent_dist.mean, tolerance
        )
        decoded = peer.decode(latents.to(dtype)).sample
        _assert_close(vae.decode(latents, normalise=False).clamp(-1, 1), decoded, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PARITY)
def test_text_encoder_equals_transformers(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=131,
        d_model=48,
        d_kv=16,
        d_ff=80,
        num_layers=3,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    peer = _shake(UMT5EncoderModel(config)).eval()
    peer.encoder.embed_tokens.weight = peer.shared.weight
    state = {k: v for k, v in peer.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file({k: v.clone().contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config.to_json_string())
    encoder = (
        ModelManager(torch_dtype=dtype, device="cpu")
        .load_models([tmp_path / "model.safetensors"])
        .fetch_model("wan_video_text_encoder")
    )
    assert encoder is not None
    ids = torch.randint(2, 131, (2, 150))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.no_grad():
        exact = peer(ids, mask).last_hidden_state
        features = encoder(ids, mask)
        rounded = peer.to(dtype)(ids, mask).last_hidden_state
    if dtype == torch.bfloat16:
        # Unscaled scores make rounding large in both; ours may not be farther from float32 than the peer.
        tolerance = 1.2 * float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        rounded = exact.to(dtype)
    _assert_close(features[0], rounded[0], tolerance)
    _assert_close(features[1, :20], rounded[1, :20], tolerance)

"""diffusers' networks on the weights of ours: resident, or with its group offloading."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import installed
from benchmarks.gpu.shared import Inputs
from diffsynth.checkpoints.layouts import DIFFUSERS_DIT, DIFFUSERS_VAE21
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.vae import WanVideoVAE

TINY = {"num_attention_heads": 1, "ffn_dim": 8, "text_dim": 8, "num_layers": 0}


class NotInstalledError(Exception):
    """A peer that this machine does not have."""


def check_installed() -> None:
    """Raise when there is no diffusers here."""
    if installed("diffusers") is None:
        raise NotInstalledError("diffusers is not installed")


def diffusers_dit(ours: WanDiT) -> nn.Module:
    """Its DiT on our weights, shared and not copied but for those that it keeps in float32.

    Built on meta, so that 14B parameters are not drawn in float32 on the host first.
    """
    check_installed()
    from diffusers import WanTransformer3DModel

    config = ours.config
    sizes = {
        "num_attention_heads": config.num_heads, "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_dim, "out_channels": config.out_dim, "text_dim": config.text_dim,
        "freq_dim": config.freq_dim, "ffn_dim": config.ffn_dim, "num_layers": config.num_layers,
        "patch_size": config.patch_size, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
    }  # fmt: skip
    with torch.device("meta"):
        peer = WanTransformer3DModel(**sizes)
    # Its rotation tables are in no checkpoint, so that nothing fills them after meta.
    peer.rope = WanTransformer3DModel(**{**sizes, **TINY}).rope.to(ours.device)
    _share(peer, ours, DIFFUSERS_DIT)
    return peer  # type: ignore[no-any-return]


def diffusers_vae(ours: WanVideoVAE) -> nn.Module:
    """Its VAE on our weights."""
    check_installed()
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        peer = AutoencoderKLWan(base_dim=ours.config.dim)
    _share(peer, ours, DIFFUSERS_VAE21)
    return peer  # type: ignore[no-any-return]


def _share(peer: nn.Module, ours: nn.Module, layout) -> None:  # type: ignore[no-untyped-def]
    weights = ours.state_dict()
    plan = layout.inverse().plan(weights)
    named = {name: weights[step.sources[0]] for name, step in plan.items()}
    peer.load_state_dict(named, strict=True, assign=True)
    wide = getattr(peer, "_keep_in_fp32_modules", None) or ()
    for name, parameter in peer.named_parameters():
        if any(part in name.split(".") for part in wide):
            parameter.data = parameter.data.float()
    peer.eval().requires_grad_(False)


def forward_of(peer: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One forward of its DiT, for one side of the guidance."""
    latents, time = inputs.latents.to(dtype), inputs.timestep.to(inputs.latents.device)
    return lambda: peer(latents, time, inputs.text, return_dict=False)[0]  # type: ignore[no-any-return]


def offload_in_groups(peer: nn.Module, device: torch.device, offload_type: str) -> None:
    """Its fastest way to stream: ``offload_type`` is "block_level" or "leaf_level", with a side stream."""
    peer.enable_group_offload(  # type: ignore[operator]
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1,
        use_stream=True,
    )

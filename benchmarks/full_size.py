"""The released networks at full size, built from our classes without memory, and their twins in diffusers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.entry import Entry
from diffsynth.checkpoints.layout import KeyLayout
from diffsynth.checkpoints.layouts import DIFFUSERS_DIT, DIFFUSERS_VAE21, UMT5
from diffsynth.checkpoints.mapped import SPELLING
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.text_encoder import WanTextEncoder
from diffsynth.models.wan.vae import WanVideoVAE

DIT_1_3B: Mapping[str, object] = {
    "dim": 1536, "in_dim": 16, "out_dim": 16, "ffn_dim": 8960, "num_layers": 30, "num_heads": 12,
    "text_dim": 4096,
}  # fmt: skip
DIT_14B: Mapping[str, object] = {**DIT_1_3B, "dim": 5120, "ffn_dim": 13824, "num_layers": 40, "num_heads": 40}
TOY_DIT: Mapping[str, object] = {
    **DIT_1_3B,
    "dim": 256,
    "ffn_dim": 512,
    "num_layers": 2,
    "num_heads": 2,
    "text_dim": 64,
}
TOY_VAE: Mapping[str, object] = {"dim": 16}

NETWORKS: Mapping[str, tuple[type[nn.Module], Mapping[str, object], KeyLayout, torch.dtype]] = {
    "dit-1.3b": (WanDiT, DIT_1_3B, DIFFUSERS_DIT, torch.bfloat16),
    "dit-14b": (WanDiT, DIT_14B, DIFFUSERS_DIT, torch.bfloat16),
    "dit-toy": (WanDiT, TOY_DIT, DIFFUSERS_DIT, torch.bfloat16),
    "vae": (WanVideoVAE, {}, DIFFUSERS_VAE21, torch.float32),
    "vae-toy": (WanVideoVAE, TOY_VAE, DIFFUSERS_VAE21, torch.float32),
    "t5": (WanTextEncoder, {}, UMT5, torch.bfloat16),
}
BLOCK_ELEMENTS = 4 << 20


def shapes_of(what: str) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a network, from our class on meta."""
    network_class, config, _, _ = NETWORKS[what]
    with torch.device("meta"):
        network = network_class.from_config(config)  # type: ignore[attr-defined]
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def random_checkpoint(what: str, dtype: torch.dtype | None = None, layout: str = "official") -> Checkpoint:
    """A checkpoint whose tensors are drawn when asked for; equal names give equal numbers in every layout."""
    stored = dtype or NETWORKS[what][3]
    block = 0.02 * torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0))

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        width = stored.itemsize * max(1, torch.Size(shape).numel())
        return Entry(
            shape,
            SPELLING[str(stored).removeprefix("torch.")],
            width,
            lambda: (draw(name, shape, block, stored), None),
        )

    made = Checkpoint((), {name: entry(name, shape) for name, shape in shapes_of(what).items()}, {})
    return made if layout == "official" else made.renamed(NETWORKS[what][2].inverse())


def draw(name: str, shape: tuple[int, ...], block: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of one tensor: the block from a place that the name decides, repeated; gains are around 1."""
    count = torch.Size(shape).numel()
    start = zlib.crc32(name.encode()) % BLOCK_ELEMENTS
    turns = -(-(start + count) // BLOCK_ELEMENTS)
    flat = (
        torch.cat([block.to(dtype)] * turns)[start : start + count]
        if turns > 1
        else block[start : start + count].to(dtype)
    )
    is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight") and len(shape) == 1)
    return (flat + 1 if is_gain else flat).view(shape)


def diffusers_config(what: str) -> dict[str, object]:
    """config.json of the same network for diffusers; see `load_diffusers_class`."""
    config = dict(NETWORKS[what][1])
    if what.startswith("dit"):
        heads = config["num_heads"]
        return {
            "_class_name": "WanTransformer3DModel", "num_attention_heads": heads,
            "attention_head_dim": int(str(config["dim"])) // int(str(heads)), "in_channels": config["in_dim"],
            "out_channels": config["out_dim"], "text_dim": config["text_dim"], "freq_dim": 256,
            "ffn_dim": config["ffn_dim"], "num_layers": config["num_layers"], "patch_size": [1, 2, 2],
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        }  # fmt: skip
    if what.startswith("vae"):
        dims = {} if "dim" not in config else {"base_dim": config["dim"]}
        return {"_class_name": "AutoencoderKLWan", **dims}
    raise ValueError(f"{what} has no class in diffusers")


def diffusers_twin(ours: nn.Module, what: str, overrides: Mapping[str, object] | None = None) -> nn.Module:
    """diffusers' network of the same sizes, on the very same weights; what it keeps in float32 it keeps."""
    import diffusers

    config = {**diffusers_config(what), **(overrides or {})}
    peer_class = getattr(diffusers, str(config.pop("_class_name")))
    peer = peer_class(**config)
    weights = ours.state_dict()
    plan = NETWORKS[what][2].inverse().plan(weights)
    peer.load_state_dict(
        {name: weights[step.sources[0]] for name, step in plan.items()}, strict=True, assign=True
    )
    for name, parameter in peer.named_parameters():
        if any(part in name.split(".") for part in getattr(peer, "_keep_in_fp32_modules", None) or ()):
            parameter.data = parameter.data.float()
    return peer.eval().requires_grad_(False)  # type: ignore[no-any-return]

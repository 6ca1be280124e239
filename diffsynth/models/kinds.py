"""Kinds of Wan models, by what they read: sizes of the smallest DiT of each kind, and its adapters.

Widths of 48 channels are toys'; what a model reads is told by the other sizes. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffsynth.conditioning.facts import DiTFacts
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.wan.dit_config import VAE22_CHANNELS
from diffsynth.models.wan.facts import config_of, facts_of

Sizes = Mapping[str, object]

DIT: dict[str, object] = {
    "dim": 48, "in_dim": 16, "out_dim": 16, "ffn_dim": 64, "num_layers": 2, "num_heads": 2, "freq_dim": 32,
    "text_dim": 32, "text_len": 64,
}  # fmt: skip
REFERENCE_ADAPTER: Sizes = {"dim": 48, "in_dim": 16, "kernel_size": (2, 2)}
CAMERA_ADAPTER: Sizes = {
    "dim": 48, "in_dim": 24, "downscale": 8, "kernel_size": (2, 2), "num_residual_blocks": 1,
}  # fmt: skip
# kind: sizes of the DiT that differ, and the adapters of its file by their name in the registry
KINDS: dict[str, tuple[Sizes, Mapping[str, Sizes]]] = {
    "t2v": ({}, {}),
    "i2v": ({"in_dim": 36, "image_dim": 32}, {}),  # Fun InP too
    "i2v-a14b": ({"in_dim": 36}, {}),
    "flf2v": ({"in_dim": 36, "image_dim": 32, "image_tokens_pos": 10}, {}),
    "control": ({"in_dim": 48, "image_dim": 32}, {}),
    "reference": (
        {"in_dim": 48, "image_dim": 32},
        {"wan_video_reference_adapter": REFERENCE_ADAPTER},
    ),
    "camera": (
        {"in_dim": 32, "image_dim": 32},
        {"wan_video_camera_adapter": CAMERA_ADAPTER},
    ),
    "vace": (
        {},
        {
            "wan_video_vace": {
                "dim": 48,
                "ffn_dim": 64,
                "num_heads": 2,
                "num_vace_blocks": 2,
                "vace_layers": (0, 1),
            }
        },
    ),
    "speed": ({}, {"wan_video_motion_controller": {"dim": 48, "freq_dim": 32}}),
    # of Wan2.2, which has no image encoder
    "control-a14b": (
        {"in_dim": 52},
        {"wan_video_reference_adapter": REFERENCE_ADAPTER},
    ),
    "camera-a14b": (
        {"in_dim": 36},
        {"wan_video_camera_adapter": CAMERA_ADAPTER},
    ),
    # with the Wan2.2 VAE
    "ti2v": ({"in_dim": VAE22_CHANNELS, "out_dim": VAE22_CHANNELS}, {}),
    "i2v-5b": ({"in_dim": 2 * VAE22_CHANNELS + 4, "out_dim": VAE22_CHANNELS}, {}),
    "control-5b": (
        {"in_dim": 3 * VAE22_CHANNELS + 4, "out_dim": VAE22_CHANNELS},
        {"wan_video_reference_adapter": {"dim": 48, "in_dim": VAE22_CHANNELS, "kernel_size": (2, 2)}},
    ),
    "camera-5b": (
        {"in_dim": 2 * VAE22_CHANNELS + 4, "out_dim": VAE22_CHANNELS},
        {
            "wan_video_camera_adapter": {
                "dim": 48,
                "in_dim": 24,
                "downscale": 16,
                "kernel_size": (2, 2),
                "num_residual_blocks": 1,
            }
        },
    ),
}


def facts_of_kind(kind: str) -> DiTFacts:
    """Return what a model of this kind reads."""
    sizes, adapters = KINDS[kind]
    parts = {row.name: row.part for row in ARCHITECTURES}
    return facts_of(config_of({**DIT, **sizes}), [parts[name] for name in adapters])

"""What a Wan DiT reads, told by its sizes and by the adapters beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from diffsynth.checkpoints.architecture import Match
from diffsynth.checkpoints.pairs import is_dit
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.models.wan.dit_config import VAE22_CHANNELS, DiTConfig

# whether the DiT is made for the 48 channels of the Wan2.2 VAE
VAE_FILES = {False: "Wan2.1_VAE.pth", True: "Wan2.2_VAE.pth"}
STRIDES = {False: 8, True: 16}


def facts_of(config: DiTConfig, adapters: Iterable[str] = ()) -> DiTFacts:
    """Return what a DiT of these sizes reads.

    Args:
        config: its sizes.
        adapters: names of those beside it, as in `Conditions`.
    """
    return DiTFacts(
        latent_channels=config.out_dim,
        text_dim=config.text_dim,
        planes=dict(config.planes),
        image_dim=config.image_dim,
        has_image_positions=config.image_tokens_pos is not None,
        holds_first_frame=config.holds_first_frame,
        patch=config.patch_size[1:],
        adapters=frozenset(adapters),
        spatial_stride=STRIDES[config.out_dim == VAE22_CHANNELS],
        vae_file=VAE_FILES[config.out_dim == VAE22_CHANNELS],
    )


def config_of(sizes: Mapping[str, Any]) -> DiTConfig:
    """Return plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
    names = {each.name for each in fields(DiTConfig)}
    return DiTConfig(**{name: size for name, size in sizes.items() if name in names})


def facts_in(matches: Iterable[Match]) -> DiTFacts | None:
    """Return what the DiT among these networks reads, with the adapters among them; None without a DiT.

    Raises:
        ConfigurationError: where a header does not tell all sizes.
    """
    config, adapters = None, []
    for match in matches:
        if is_dit(match):
            config = config_of(match.require_config())
        elif match.architecture.is_adapter:
            adapters.append(match.architecture.part)
    return None if config is None else facts_of(config, adapters)

"""What a DiT reads, assumed where clips are encoded without it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from diffsynth.conditioning.facts import DiTFacts
from diffsynth.models.wan.dit_config import MASK_CHANNELS, VAE22_CHANNELS
from diffsynth.models.wan.facts import STRIDES, VAE_FILES
from diffsynth.pipelines.components import PipelineComponents

TEXT_TO_VIDEO = DiTFacts()
TI2V_5B = DiTFacts(
    latent_channels=VAE22_CHANNELS, holds_first_frame=True, spatial_stride=STRIDES[True],
    vae_file=VAE_FILES[True],
)  # fmt: skip
# What DiffSynth-Studio v1 encodes for when it is given an image encoder: Wan2.1 I2V-14B.
IMAGE_TO_VIDEO = DiTFacts(planes={"mask": MASK_CHANNELS, "image": 16}, image_dim=1280)


@dataclass(kw_only=True)
class AssumedComponents(PipelineComponents):
    """The parts of a pipeline without a DiT, which encode as if one with these facts were there."""

    assumed: DiTFacts

    @property
    def facts(self) -> DiTFacts:
        return self.assumed


def assuming(parts: PipelineComponents, facts: DiTFacts) -> AssumedComponents:
    """Return parts that encode for a DiT that is not loaded: ``WanVideoPipeline(assuming(parts, facts))``."""
    assert parts.high is None, "the DiT that is loaded says what it reads"
    return AssumedComponents(**{f.name: getattr(parts, f.name) for f in fields(parts)}, assumed=facts)

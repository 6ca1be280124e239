"""What a DiT reads, as facts: known from its header, or assumed where clips are encoded without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from diffsynth.models.wan.dit_config import MASK_CHANNELS, VAE22_CHANNELS, DiTConfig
from diffsynth.pipelines.components import VAE_FILES, PipelineComponents


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTFacts:
    """The facts of a DiT that its cached samples must agree with."""

    latent_channels: int = 16
    text_dim: int = 4096
    planes: Mapping[str, int] = field(default_factory=dict)  # channels of each plane beside the noise
    image_dim: int | None = None  # width of image tokens; None: it reads none
    has_image_positions: bool = False  # it draws what lies between two pictures
    holds_first_frame: bool = False  # it may hold a given first frame clean
    patch: tuple[int, int] = (2, 2)  # latent rows and columns of a token
    adapters: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: DiTConfig, adapters: Iterable[str] = ()) -> DiTFacts:
        """Those of a DiT and the adapters beside it."""
        return cls(
            latent_channels=config.out_dim,
            text_dim=config.text_dim,
            planes=dict(config.planes),
            image_dim=config.image_dim,
            has_image_positions=config.image_tokens_pos is not None,
            holds_first_frame=config.holds_first_frame,
            patch=config.patch_size[1:],
            adapters=frozenset(adapters),
        )


TEXT_TO_VIDEO = DiTFacts()
TI2V_5B = DiTFacts(latent_channels=VAE22_CHANNELS, holds_first_frame=True)
# What DiffSynth-Studio v1 encodes for when it is given an image encoder: Wan2.1 I2V-14B.
IMAGE_TO_VIDEO = DiTFacts(planes={"mask": MASK_CHANNELS, "image": 16}, image_dim=1280)


@dataclass(kw_only=True)
class AssumedComponents(PipelineComponents):
    """The parts of a pipeline without a DiT, which encode as if one with these facts were there."""

    facts: DiTFacts

    @property
    def planes(self) -> Mapping[str, int]:
        return self.facts.planes

    @property
    def has_image_branch(self) -> bool:
        return self.facts.image_dim is not None

    @property
    def image_dim(self) -> int | None:
        return self.facts.image_dim

    @property
    def has_image_positions(self) -> bool:
        return self.facts.has_image_positions

    @property
    def holds_first_frame(self) -> bool:
        return self.facts.holds_first_frame

    @property
    def latent_channels(self) -> int:
        return self.facts.latent_channels

    @property
    def patch(self) -> tuple[int, int]:
        return self.facts.patch

    @property
    def vae_file(self) -> str:
        return VAE_FILES[self.facts.latent_channels == VAE22_CHANNELS]

    @property
    def adapters(self) -> frozenset[str]:
        return self.facts.adapters


def assuming(parts: PipelineComponents, facts: DiTFacts) -> AssumedComponents:
    """Return parts that encode for a DiT that is not loaded: ``WanVideoPipeline(assuming(parts, facts))``."""
    assert parts.high is None, "the DiT that is loaded says what it reads"
    return AssumedComponents(**{f.name: getattr(parts, f.name) for f in fields(parts)}, facts=facts)

"""What a DiT reads, as facts: told by its header, or assumed where clips are encoded without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTFacts:
    """What decides which inputs a DiT and the adapters beside it read, and which samples fit it."""

    latent_channels: int = 16
    text_dim: int = 4096
    planes: Mapping[str, int] = field(default_factory=dict)  # channels of each plane beside the noise
    image_dim: int | None = None  # width of the features of an image encoder; None: it reads none
    has_image_positions: bool = False  # image tokens have learned positions: of a first and a last frame
    holds_first_frame: bool = False  # a given first frame is a latent that stays clean, with its own clock
    patch: tuple[int, int] = (2, 2)  # latent rows and columns of a token
    spatial_stride: int = 8  # pixels along an edge of a latent position, of the VAE that it was made for
    adapters: frozenset[str] = frozenset()  # names of those beside the DiT
    vae_file: str = "Wan2.1_VAE.pth"  # name of that VAE's released file

    @property
    def has_image_branch(self) -> bool:
        """Whether it reads tokens of an image encoder."""
        return self.image_dim is not None

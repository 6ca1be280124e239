"""Sizes of a Wan DiT, and what they say about its inputs."""

from __future__ import annotations

from dataclasses import dataclass

from diffsynth.errors import ConfigurationError

PLANE_ORDER = ("control", "mask", "image")  # in which planes stand behind the noise
MASK_CHANNELS = 4
VAE22_CHANNELS = 48  # of a latent of the Wan2.2 VAE


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Sizes of a Wan DiT: told by the file's shapes, else by its metadata, config.json or a rule."""

    dim: int
    in_dim: int  # channels that enter: the latent's and those of the planes
    out_dim: int  # channels of the latent: 16, or 48 for the Wan2.2 VAE
    ffn_dim: int
    num_layers: int
    num_heads: int
    freq_dim: int = 256  # of the time's sinusoids
    text_dim: int = 4096  # of the text encoder
    text_len: int = 512  # rows to which text is padded
    image_dim: int | None = None  # of the image encoder; None: no image tokens
    image_tokens_pos: int | None = None  # rows of learned positions of the image tokens (FLF2V)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigurationError(
                f"dim {self.dim} does not split into {self.num_heads} heads of an even size."
            )

    @property
    def planes(self) -> dict[str, int]:
        """Channels of each plane beside the noise, told by in_dim - out_dim."""
        return plane_channels(self.in_dim, self.out_dim)

    @property
    def holds_first_frame(self) -> bool:
        """Whether a given first frame is a latent that stays clean, with a clock of its own."""
        return holds_first_frame(self.out_dim)


def holds_first_frame(out_dim: int) -> bool:
    """Tell TI2V-5B and what was made of it (Fun-5B): its latents are those of the Wan2.2 VAE."""
    return out_dim == VAE22_CHANNELS


def plane_channels(in_dim: int, out_dim: int) -> dict[str, int]:
    """Name the planes: 0 none, z image, z + 4 mask and image, 2 z control and image, 2 z + 4 all three."""
    z, extra = out_dim, in_dim - out_dim
    known: dict[int, tuple[str, ...]] = {
        0: (),
        z: ("image",),
        z + MASK_CHANNELS: ("mask", "image"),
        2 * z: ("control", "image"),
        2 * z + MASK_CHANNELS: ("control", "mask", "image"),
    }
    if extra not in known:
        raise ConfigurationError(
            f"in_dim {in_dim} with out_dim {out_dim}: no known planes have {extra} channels."
        )
    return {name: MASK_CHANNELS if name == "mask" else z for name in known[extra]}

"""The reference adapter of Fun V1.1 Control: one picture becomes tokens in front of the video's.

Letters: B batch, C latent channels, H W latent height and width, h w the same in patches, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from diffsynth.conditioning.reference import Reference
from diffsynth.errors import ArgumentError, ConfigurationError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.ops.rope import video_rotation

if TYPE_CHECKING:
    from diffsynth.models.wan.dit import WanDiT
    from diffsynth.models.wan.dit_config import DiTConfig
    from diffsynth.models.wan.stream import TokenStream
    from diffsynth.sampling.step import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceConfig:
    """Sizes of the reference adapter."""

    dim: int  # width of the DiT
    in_dim: int  # latent channels
    kernel_size: tuple[int, int] = (2, 2)  # latent rows and columns of one token


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A reference as tokens."""

    tokens: Tensor  # (B or 1, h w, D)
    size: tuple[int, ...]  # T, H, W of its latents
    grid: tuple[int, ...]  # h, w
    head_dim: int  # of the DiT


class ReferenceAdapter(DiTAdapter):
    """Puts the tokens of a reference picture in front of the video's, and moves the video one frame on.

    The picture stands at time 0 of the rotary positions and the video from 1; its tokens follow the clock of
    the video's last frame and are not part of the velocity. Without a picture there are no such tokens.

    Source: wan_numerics 10.3; DiffSynth-Studio ``pipelines/wan_video.py`` model_fn_wan_video.
    """

    name = "reference"

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.ref_conv = nn.Conv2d(config.in_dim, config.dim, config.kernel_size, stride=config.kernel_size)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ReferenceAdapter:
        """Build from plain sizes, as a checkpoint's header tells them."""
        rows, columns = cast("tuple[int, int]", config["kernel_size"])
        sizes = ReferenceConfig(
            dim=cast("int", config["dim"]), in_dim=cast("int", config["in_dim"]), kernel_size=(rows, columns)
        )
        return cls(sizes)

    def join(self, dit: DiTConfig) -> None:
        own = self.config
        if (own.in_dim, own.kernel_size) != (dit.out_dim, dit.patch_size[1:]):
            raise ConfigurationError(
                f"The reference adapter reads {own.in_dim} channels in patches of {own.kernel_size} and its "
                f"DiT makes {dit.out_dim} in patches of {dit.patch_size[1:]}; load the pair that belongs "
                "together."
            )

    def prepare(self, given: object, dit: WanDiT) -> object:
        assert isinstance(given, Reference)
        grid = self.ref_conv(given.latents[:, :, 0].to(dit.device, dit.dtype))
        return _Picture(
            tokens=grid.flatten(2).transpose(1, 2), size=tuple(given.latents.shape[2:]),
            grid=tuple(grid.shape[2:]), head_dim=dit.config.dim // dit.config.num_heads,
        )  # fmt: skip

    def extend(self, stream: TokenStream, memory: object, step: Step | None = None) -> TokenStream:
        assert isinstance(memory, _Picture)
        f, h, w = stream.grid
        if memory.size[0] != 1 or memory.grid != (h, w):
            size = [n * k for n, k in zip((h, w), self.config.kernel_size, strict=True)]
            raise ArgumentError(
                f"the reference's latents are {memory.size}, one frame of {size[0]} x {size[1]} is expected; "
                "encode the picture at the size of the video."
            )
        rotary = video_rotation((f + 1, h, w), memory.head_dim, stream.x.device)
        tokens = memory.tokens.expand(stream.x.shape[0], -1, -1)
        return stream.with_video_rotary(rotary[h * w :]).with_tokens(tokens, rotary[: h * w])

"""The CLIP image encoder that Wan2.1 looks at pictures with: the visual tower of open-clip's ViT-H/14.

Letters: B batch, L = 1 + (S / patch)^2 tokens, the class token first, S side of a picture, D width, N heads.
Features are the tokens before the last layer: neither that layer nor the norm and projection behind it are
read, nor is the text tower that the official file carries too. Source: Wan2.1 ``wan/modules/clip.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.errors import ConfigurationError
from diffsynth.ops.attention import attend
from diffsynth.vram_management.visit import BlockNetwork

# of the pictures that CLIP was trained on, red, green, blue
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoderConfig:
    """Sizes of a visual tower, told by the file's shapes; heads by config.json or the rule."""

    image_size: int = 224  # pixels of a side
    patch_size: int = 14
    dim: int = 1280
    dim_ffn: int = 5120
    num_heads: int = 16
    num_layers: int = 32  # of the checkpoint; all but the last are read
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_layers < 2:
            raise ConfigurationError(
                f"the image encoder has {self.num_layers} layers; features are those before the last, so it "
                "needs 2 or more."
            )
        if self.dim % self.num_heads:
            raise ConfigurationError(
                f"dim {self.dim} of the image encoder does not split into {self.num_heads} heads."
            )

    @property
    def num_tokens(self) -> int:
        """Of one picture: its patches and the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2


def preprocess(picture: Tensor, size: int) -> Tensor:
    """Return a picture as CLIP sees it.

    Args:
        picture: (B, 3, H, W) in [-1, 1], of any proportions: they are given up.
        size: side in pixels.

    Returns:
        (B, 3, size, size) float32, not clamped where bicubic overshoots.

    Source: Wan2.1 ``wan/modules/clip.py`` CLIPModel.visual; bicubic without antialiasing.
    """
    mean, std = (picture.new_tensor(row, dtype=torch.float32)[:, None, None] for row in (CLIP_MEAN, CLIP_STD))
    square = F.interpolate(picture.float(), size=(size, size), mode="bicubic", align_corners=False)
    return (square * 0.5 + 0.5 - mean) / std


class SelfAttention(nn.Module):
    """All tokens to all tokens; q, k and v are one layer."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_qkv = nn.Linear(config.dim, config.dim * 3)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).unbind(2)
        return self.proj(attend(q, k, v).flatten(2))  # type: ignore[no-any-return]


class ImageEncoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.dim_ffn), nn.GELU(), nn.Linear(config.dim_ffn, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class VisualTower(nn.Module):
    """The layers under their official names."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size, bias=False
        )
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, config.eps)
        self.transformer = nn.ModuleList(ImageEncoderLayer(config) for _ in range(config.num_layers - 1))


class WanImageEncoder(BlockNetwork):
    """Pictures -> features, (pictures, tokens, D)."""

    def __init__(self, config: ImageEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ImageEncoderConfig()
        self.visual = VisualTower(config)
        self.unread = (
            "textual.", "log_scale", "visual.post_norm.", "visual.head",
            f"visual.transformer.{config.num_layers - 1}.",
        )  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> WanImageEncoder:
        """Build from plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
        names = {f.name for f in fields(ImageEncoderConfig)}
        return cls(ImageEncoderConfig(**{k: v for k, v in config.items() if k in names}))  # type: ignore[arg-type]

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, as what streams them looks for them."""
        return self.visual.transformer

    @property
    def num_tokens(self) -> int:
        """Of one picture."""
        return self.config.num_tokens

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return self.visual.pre_norm.weight.device

    def forward(self, pictures: Sequence[Tensor]) -> Tensor:
        """Return the features of each picture.

        Args:
            pictures: each (1, 3, H, W) in [-1, 1], of any size.

        Returns:
            (pictures, L, D) in the dtype of the weights.
        """
        weight = self.visual.patch_embedding.weight
        seen = torch.cat([preprocess(one.to(self.device), self.config.image_size) for one in pictures])
        patches = self.visual.patch_embedding(seen.to(weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.visual.cls_embedding.expand(len(patches), -1, -1), patches], dim=1)
        x: Tensor = self.visual.pre_norm(tokens + self.visual.pos_embedding)
        for block in self.visit(self.blocks):
            x = block(x)
        return x

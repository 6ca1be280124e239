"""What turns a user's inputs into conditions: one conditioner per kind of input.

Each declares the arguments of ``pipe()`` that it reads (`Inputs`) and the one model that it needs on the GPU
(`encoder`). Conditioners see networks only through `Components`; they import none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffsynth.conditioning.conditions import Contribution
    from diffsynth.conditioning.facts import DiTFacts
    from diffsynth.conditioning.tokenizer import Tokenizer
    from diffsynth.video.lazy_video import LazyVideo


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Sizes of one generation, in pixels and in latent positions."""

    num_videos: int  # B
    num_frames: int  # pixel frames, 4 k + 1
    height: int  # pixels
    width: int
    latent_channels: int
    latent_frames: int
    latent_height: int
    latent_width: int
    num_steps: int = 1  # of denoising, which inputs with a value per step are counted by

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """(B, C, F, H, W) of the latents."""
        return (
            self.num_videos,
            self.latent_channels,
            self.latent_frames,
            self.latent_height,
            self.latent_width,
        )


class TextEncoderLike(Protocol):
    """Ids and mask (B, L) -> features (B, L, D)."""

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor: ...


class ImageEncoderLike(Protocol):
    """Pictures, each (1, 3, H, W) in [-1, 1], of any size -> features (pictures, tokens, D)."""

    @property
    def num_tokens(self) -> int:
        """Of one picture."""
        ...

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor: ...


class VAELike(Protocol):
    """Video (B, 3, F, H, W) in [-1, 1] -> latents (B, C, F, H, W)."""

    def encode(
        self,
        video: Tensor | LazyVideo,
        *,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> Tensor: ...


class Components(Protocol):
    """The parts of a pipeline that conditioners may use."""

    device: torch.device
    known_words: frozenset[str]  # words that a small text encoder was taught; empty: it knows language

    @property
    def facts(self) -> DiTFacts:
        """What the DiT and the adapters beside it read."""
        ...

    @property
    def text_encoder(self) -> TextEncoderLike | None: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def image_encoder(self) -> ImageEncoderLike | None: ...
    @property
    def vae(self) -> VAELike | None: ...

    def encode_video(
        self,
        video: Tensor | LazyVideo,
        *,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> Tensor:
        """Latents of a video that lies anywhere, on the device; in tiles if asked for or where they fit."""
        ...


class Conditioner(Protocol):
    """One kind of input. It may also be a `SizeChecker`."""

    Inputs: ClassVar[type]  # frozen dataclass: the arguments of pipe() that it reads
    encoder: ClassVar[str | None]  # the one model it needs on the GPU, or None

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        """Names of the arguments that it reads for a model with these facts; none: there is no use for them.

        A call with another argument of `Inputs` that the model could not use is refused before `applies`.
        """
        ...

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        """Names of those without which such a model does not run."""
        ...

    def applies(self, inputs: Any, parts: Components) -> bool:
        """Whether there is something to do; raises for inputs that do not go together, or lack one."""
        ...

    def needs_encoder(self, inputs: Any, parts: Components) -> bool:
        """Whether `encode` asks `encoder` this time; if not, it stays where it rests, or may be missing."""
        ...

    def encode(self, inputs: Any, geometry: Geometry, parts: Components) -> Contribution:
        """Do it; `encoder` is on the device if it is needed."""
        ...


@runtime_checkable
class SizeChecker(Protocol):
    """A conditioner that also knows, before any model moves, whether its input fits the sizes of a call."""

    def check(self, inputs: Any, geometry: Geometry, parts: Components) -> None:
        """Raise for an input that `applies` and yet does not fit, such as a video of another length."""
        ...


def read_inputs(kind: type, arguments: Mapping[str, object]) -> Any:
    """Make a conditioner's ``Inputs`` from the arguments of a call."""
    names = [f.name for f in fields(kind)]
    return kind(**{name: arguments[name] for name in names if name in arguments})

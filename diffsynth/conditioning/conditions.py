"""What the DiT is told besides noise and time, and what conditioners say about the latent itself.

Letters: B batch, C latent channels, T latent frames, h w latent height and width, D a network's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """One side of the guidance."""

    text: Tensor  # (B, tokens, text_dim), padded with zeros to text_len inside the DiT
    image: Tensor | None = None  # (B, 257 per image, 1280), never joined with text
    planes: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # "control" | "mask" | "image" -> (B, c, T, h, w)
    adapters: Mapping[str, object] = field(default_factory=dict)  # adapter name -> its own frozen input


@dataclass(frozen=True, kw_only=True)
class LatentPlan:
    """What conditioners say about the latent itself."""

    extra_frames: int = 0  # latent frames put in front, cut off before decoding
    start: Tensor | None = None  # clean latent of an input video, (B, C, T, h, w)
    pinned: Tensor | None = None  # first frames held clean at every step, (B, C, n, h, w)

    @property
    def num_pinned(self) -> int:
        """Latent frames held clean."""
        return 0 if self.pinned is None else self.pinned.shape[2]

    def pin(self, latents: Tensor) -> Tensor:
        """Put the clean frames back."""
        if self.pinned is None:
            return latents
        latents = latents.clone()
        latents[:, :, : self.num_pinned] = self.pinned.to(latents)
        return latents

    def trim(self, latents: Tensor) -> Tensor:
        """Cut off the frames that were put in front."""
        return latents[:, :, self.extra_frames :]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one conditioner adds. Each slot may be filled by one conditioner only."""

    text: tuple[Tensor, Tensor | None] | None = None  # positive, negative (None = the same)
    image: tuple[Tensor, Tensor | None] | None = None
    planes: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    adapters: Mapping[str, tuple[object, object | None]] = field(default_factory=dict)
    latents: LatentPlan | None = None


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Everything the loop needs: both sides of the guidance and the plan of the latent."""

    positive: Conditions
    negative: Conditions
    latents: LatentPlan


class _Slots:
    """Slots that each take one writer; a second one is an error that names both."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[object, object | None]] = {}
        self._writers: dict[str, str] = {}

    def fill(self, slot: str, value: tuple[object, object | None], writer: str) -> None:
        if slot in self._writers:
            raise ArgumentError(
                f"{self._writers[slot]} and {writer} both set {slot!r}; give the inputs of one of them only."
            )
        self._writers[slot] = writer
        self.values[slot] = value

    def side(self, prefix: str, index: int) -> dict[str, object]:
        picked = {}
        for slot, pair in self.values.items():
            if slot.startswith(prefix):
                picked[slot.removeprefix(prefix)] = pair[0] if index == 0 or pair[1] is None else pair[1]
        return picked


def merge(contributions: Mapping[str, Contribution]) -> Merged:
    """Join what the conditioners said, by conditioner name; their order cannot change the result.

    Raises:
        ArgumentError: when two conditioners fill one slot, or no one gave a text.
    """
    slots, plan, planners = _Slots(), LatentPlan(), dict[str, str]()
    for writer, given in contributions.items():
        if given.text is not None:
            slots.fill("text", given.text, writer)
        if given.image is not None:
            slots.fill("image", given.image, writer)
        for name, pair in given.planes.items():
            slots.fill(f"plane {name}", pair, writer)
        for name, value in given.adapters.items():
            slots.fill(f"adapter {name}", value, writer)
        if given.latents is not None:
            plan = _join_plans(plan, given.latents, writer, planners)
    if "text" not in slots.values:
        raise ArgumentError("No text condition: give prompt=, or prompt_embeds=.")
    sides = [
        Conditions(
            text=slots.side("text", i)[""],  # type: ignore[arg-type]
            image=slots.side("image", i).get(""),  # type: ignore[arg-type]
            planes=slots.side("plane ", i),  # type: ignore[arg-type]
            adapters=slots.side("adapter ", i),
        )
        for i in (0, 1)
    ]
    return Merged(positive=sides[0], negative=sides[1], latents=plan)


def _join_plans(plan: LatentPlan, more: LatentPlan, writer: str, planners: dict[str, str]) -> LatentPlan:
    changed: dict[str, object] = {}
    for name, value in (
        ("extra_frames", more.extra_frames or None),
        ("start", more.start),
        ("pinned", more.pinned),
    ):
        if value is None:
            continue
        if name in planners:
            raise ArgumentError(
                f"{planners[name]} and {writer} both decide {name!r} of the latent; give one of them only."
            )
        planners[name] = writer
        changed[name] = value
    return replace(plan, **changed)  # type: ignore[arg-type]

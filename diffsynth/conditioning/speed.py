"""Speed control: how fast things move, told by a number."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.argument import SOURCE, argument
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("diffsynth")

SLOWEST, FASTEST = 0, 100  # the range that the released adapter was made for


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the speed adapter is given."""

    motion_bucket_id: Tensor  # (B,), 0 (slow) to 100 (fast)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedInputs:
    """How fast things move."""

    motion_bucket_id: float | None = argument(
        None, help="Of the speed-control model: 0 (slow) to 100 (fast).", kind="number", scope="clip",
        unit="0 (slow) to 100 (fast)", group=SOURCE,
        unread="no loaded model reads it: it needs the speed-control model",
    )  # fmt: skip

    def __post_init__(self) -> None:
        given = self.motion_bucket_id
        if given is None:
            return
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            raise ArgumentError(
                f"motion_bucket_id is {given!r}; give a number, {SLOWEST} (slow) to {FASTEST} (fast)."
            )


class SpeedConditioner:
    """A number for the speed adapter; no encoder."""

    Inputs: ClassVar[type] = SpeedInputs
    encoder: ClassVar[str | None] = None

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset({"motion_bucket_id"}) if "speed" in facts.adapters else frozenset()

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset()

    def applies(self, inputs: SpeedInputs, parts: Components) -> bool:
        given = inputs.motion_bucket_id
        if given is None:
            return False
        if not SLOWEST <= given <= FASTEST:
            logger.warning(
                "motion_bucket_id is %s; the speed-control model was made for %d to %d.",
                given, SLOWEST, FASTEST,
            )  # fmt: skip
        return True

    def needs_encoder(self, inputs: SpeedInputs, parts: Components) -> bool:
        return False

    def encode(self, inputs: SpeedInputs, geometry: Geometry, parts: Components) -> Contribution:
        import torch

        assert inputs.motion_bucket_id is not None
        ids = torch.full((geometry.num_videos,), float(inputs.motion_bucket_id), dtype=torch.float64)
        return Contribution(adapters={"speed": (Speed(motion_bucket_id=ids), None)})

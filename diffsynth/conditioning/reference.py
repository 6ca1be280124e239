"""Fun Reference: a picture whose subject or style the video takes up, told beside the control video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.argument import SOURCE, argument, names_read
from diffsynth.conditioning.clips import about, check_picture
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.image import ADVICE

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.video import Frame, Resize


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the reference adapter is given."""

    latents: Tensor  # (B or 1, C, 1, H, W) of the picture, H and W those of the video's latents


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceInputs:
    """A picture of what the video shows."""

    # PIL, uint8 (H, W, 3), or floats in [0, 1] (3, H, W)
    reference_image: Frame | None = argument(
        None, help="What the video shows, of a Fun V1.1 Control model.", kind="picture", scope="clip",
        group=SOURCE, own_size=True, unread="no loaded model reads it: it needs a Fun V1.1 Control model",
    )  # fmt: skip
    resize: Resize = "cover"  # as of input_image


class ReferenceConditioner:
    """The latent of a reference picture; the adapter makes tokens of it.

    Source: wan_numerics 10.3. The picture is coded whole, never in tiles, as in DiffSynth-Studio v1.
    """

    Inputs: ClassVar[type] = ReferenceInputs
    encoder: ClassVar[str | None] = "vae"

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset(names_read([ReferenceInputs])) if "reference" in facts.adapters else frozenset()

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset()

    def applies(self, inputs: ReferenceInputs, parts: Components) -> bool:
        return inputs.reference_image is not None

    def needs_encoder(self, inputs: ReferenceInputs, parts: Components) -> bool:
        return True

    def check(self, inputs: ReferenceInputs, geometry: Geometry, parts: Components) -> None:
        assert inputs.reference_image is not None
        check_picture(inputs.reference_image, "reference_image")

    def encode(self, inputs: ReferenceInputs, geometry: Geometry, parts: Components) -> Contribution:
        import torch

        from diffsynth.video import frames_to_tensor

        assert parts.vae is not None and inputs.reference_image is not None
        with about("reference_image", is_picture=True):
            picture = frames_to_tensor(
                [inputs.reference_image], geometry.height, geometry.width, inputs.resize,
                name="reference_image", advice=ADVICE,
            )  # fmt: skip
        with torch.no_grad():
            latents = parts.encode_video(picture)
        given = Reference(latents=latents.expand(geometry.num_videos, -1, -1, -1, -1))
        return Contribution(adapters={"reference": (given, None)})

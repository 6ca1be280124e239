"""Lines 1 to 4 of a generation: a call is checked, and conditioners say what the DiT is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.conditions import Contribution, Merged, merge
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.conditioning.text import TextConditioner, TextInputs
from diffsynth.errors import MissingModelError
from diffsynth.pipelines.request import VideoRequest, read_request

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.vram_management.residency import Residency

# Text is encoded without a size.
NO_SIZE = Geometry(num_videos=1, num_frames=1, height=0, width=0, latent_channels=0, latent_frames=1,
                   latent_height=0, latent_width=0)  # fmt: skip


def encode_request(
    request: VideoRequest, parts: PipelineComponents, residency: Residency, staying: Sequence[str] = ()
) -> Merged:
    """Ask every conditioner of a call, grouped by encoder: each encoder comes to the device once.

    Args:
        request: a checked call.
        parts: of the pipeline.
        residency: brings networks in.
        staying: networks that stay on the device all the while.
    """
    contributions: dict[str, Contribution] = {}
    parts.tiled = request.options.tiled
    encoders = dict.fromkeys(CONDITIONERS[name].encoder for name in request.inputs)
    for encoder in encoders:
        group = {n: inputs for n, inputs in request.inputs.items() if CONDITIONERS[n].encoder == encoder}
        is_needed = any(CONDITIONERS[n].needs_encoder(inputs, parts) for n, inputs in group.items())
        coming = (encoder,) if encoder is not None and is_needed and encoder not in staying else ()
        with residency.use(*staying, *coming):
            for name, inputs in group.items():
                contributions[name] = CONDITIONERS[name].encode(inputs, request.geometry, parts)
    return merge(contributions)


class EncodingSession:
    """What `WanVideoPipeline.encoding` gives: the pipeline's own conditioners, call after call.

    Args:
        parts: of the pipeline.
        precision: of the pipeline.
        residency: of the pipeline.
        staying: networks that are on the device for the whole session.
    """

    def __init__(
        self, parts: PipelineComponents, precision: str, residency: Residency, staying: Sequence[str]
    ) -> None:
        self._parts, self._precision = parts, precision
        self._residency, self._staying = residency, tuple(staying)

    @torch.no_grad()
    def conditions(self, arguments: Mapping[str, object]) -> Merged:
        """Both sides of the guidance, for the arguments of ``pipe()``.

        Raises:
            As ``pipe()`` does before any model moves.
        """
        request = read_request(arguments, self._parts, self._precision)
        return encode_request(request, self._parts, self._residency, self._staying)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """Features of one text, (1, tokens, D), without padding.

        Raises:
            MissingModelError: without a text encoder.
        """
        conditioner, inputs = TextConditioner(), TextInputs(prompt=prompt, cfg_scale=1.0)
        conditioner.applies(inputs, self._parts)  # raises where the encoder is missing
        told = conditioner.encode(inputs, NO_SIZE, self._parts).text
        assert told is not None
        return told[0]

    @torch.no_grad()
    def latents(
        self,
        video: Tensor,
        *,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> Tensor:
        """The clean latent (1, C, T, h, w) float32 of 8-bit frames (F, H, W, 3), on the device.

        Raises:
            MissingModelError: without a VAE.
            ArgumentError: for sizes that the VAE does not code.
        """
        if self._parts.vae is None:
            raise MissingModelError(f"No VAE is loaded; load {self._parts.facts.vae_file}.")
        levels = video.permute(3, 0, 1, 2)[None]
        return self._parts.encode_video(levels, tile_size=tile_size, tile_stride=tile_stride)

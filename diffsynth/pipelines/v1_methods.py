"""Methods that scripts of DiffSynth-Studio call on a pipeline between its own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.conditioning.text import TextConditioner, TextInputs
from diffsynth.errors import ArgumentError, MissingModelError
from diffsynth.pipelines.rungs import Tiling
from diffsynth.sampling.flow_match import FlowMatchScheduler
from diffsynth.video import tensor_to_frames, to_pil
from diffsynth.video.lazy_video import LazyVideo
from diffsynth.video.pixels import normalised_frames

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.pipelines.decoding import VideoDecoder
    from diffsynth.pipelines.memory import MemoryManager
    from diffsynth.vram_management.residency import Residency

TILE_SIZE, TILE_STRIDE = (34, 34), (18, 16)  # of v1's methods, in latent positions
TEXT_LEN = 512  # rows of a prompt, where no DiT says
# v1's names of networks -> ours for the device
ON_DEVICE = {
    "dit": "dit", "dit2": "dit_low_noise", "vae": "vae", "text_encoder": "text_encoder",
    "image_encoder": "image_encoder", "motion_controller": "speed", "vace": "vace", "vace2": "vace_low_noise",
}  # fmt: skip
_UNITS = (
    "a call goes through conditioners (diffsynth/conditioning) that no script exchanges; see "
    "docs/add_a_variant.md for an input or a network of your own"
)
ABSENT = {
    "units": _UNITS,
    "post_units": _UNITS,
    "unit_runner": _UNITS,
    "model_fn": "the DiT is called as pipe.dit(latents, timestep, [pipe.dit.prepare(conditions)])",
    "prompter": "encode_prompt(TEXT) gives a prompt's features",
    "training_loss": "diffsynth train trains; see docs/training.md",
}


class V1Methods:
    """See this module's legend; `WanVideoPipeline.__call__` needs none of them."""

    parts: PipelineComponents
    precision: str
    _memory: MemoryManager
    _residency: Residency
    _scheduler: FlowMatchScheduler | None = None

    if TYPE_CHECKING:
        _alone: Callable[[], AbstractContextManager[None]]
        _resting: Callable[[], AbstractContextManager[None]]

        @property
        def dit(self) -> nn.Module | None: ...
        def _decoder(self, latents: Tensor, tiling: Tiling) -> VideoDecoder: ...

    def __getattr__(self, name: str) -> NoReturn:
        more = f": {ABSENT[name]}" if name in ABSENT else ""
        raise AttributeError(f"WanVideoPipeline has no {name!r}{more}.")

    @property
    def scheduler(self) -> FlowMatchScheduler:
        """The noise levels of the last call. For reading: a call makes its own, see ``sampler=``."""
        if self._scheduler is None:
            self._scheduler = FlowMatchScheduler()
        return self._scheduler

    def denoising_model(self) -> nn.Module | None:
        """The DiT."""
        return self.dit

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], positive: bool = True) -> dict[str, Tensor]:
        """Features of a prompt as ``{"context": (B, 512, text_dim)}``, zeros behind its end.

        ``pipe(prompt_embeds=...)`` takes them. ``positive`` changes nothing, as in v1.

        Raises:
            MissingModelError: without a text encoder.
        """
        texts, inputs = TextConditioner(), TextInputs(prompt=prompt, cfg_scale=1.0)
        texts.applies(inputs, self.parts)
        with self._alone(), self._residency.use("text_encoder"):
            features, _ = texts.features(inputs, self.parts)
        high = self.parts.high
        length = TEXT_LEN if high is None else high.dit.config.text_len
        rows = features[:, :length]
        context = F.pad(rows, (0, 0, 0, length - rows.shape[1]))
        return {"context": context.to(self.parts.device, self.parts.dtype)}

    @torch.no_grad()
    def encode_video(
        self,
        input_video: Tensor | Iterable[Image],
        tiled: bool = True,
        tile_size: tuple[int, int] = TILE_SIZE,
        tile_stride: tuple[int, int] = TILE_STRIDE,
    ) -> Tensor:
        """Clean latents (1, C, T, h, w) of frames, or of a tensor (1, 3, F, H, W) in [-1, 1].

        Raises:
            MissingModelError: without a VAE.
            ArgumentError: for sizes that the VAE does not code.
        """
        vae = self.parts.vae
        if vae is None:
            raise MissingModelError(f"No VAE is loaded; load {self.parts.facts.vae_file}.")
        pixels = input_video.float() if isinstance(input_video, Tensor) else _lazy(input_video)
        with self._alone(), self._residency.use("vae"):
            self.parts.tiled = None
            return self.parts.encode_video(
                pixels,
                tile_size=tile_size if tiled else None, tile_stride=tile_stride if tiled else None,
            )  # fmt: skip

    @torch.no_grad()
    def decode_video(
        self,
        latents: Tensor,
        tiled: bool = True,
        tile_size: tuple[int, int] = TILE_SIZE,
        tile_stride: tuple[int, int] = TILE_STRIDE,
    ) -> Tensor:
        """Frames (B, 3, F, H, W) in [-1, 1], float32 on the host; `tensor2video` makes pictures of one video.

        Raises:
            As `WanVideoPipeline.decode`, which gives pictures at once.
        """
        decoder = self._decoder(latents, Tiling(tiled, tile_size, tile_stride))
        with self._alone(), self._residency.use("vae"):
            frames = cast("Tensor", decoder.videos(latents, "pt", is_batch=True))
        return frames.transpose(1, 2).mul(2).sub(1)

    def tensor2video(self, frames: Tensor) -> list[Image]:
        """Pictures of one decoded video (3, F, H, W) in [-1, 1]."""
        return to_pil(tensor_to_frames(frames[None], "truncate" if self.precision == "v1" else "round")[0])

    def generate_noise(
        self,
        shape: Sequence[int],
        seed: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The noise that a seed draws; ``pipe(latents=...)`` takes it."""
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)

    def load_models_to_device(self, loadmodel_names: str | Sequence[str] = ()) -> None:
        """Bring these networks to the device, and let all others rest where they were loaded to.

        Raises:
            ArgumentError: for a name that is none of v1's.
        """
        names = [loadmodel_names] if isinstance(loadmodel_names, str) else list(loadmodel_names)
        if unknown := [name for name in names if name not in ON_DEVICE]:
            raise ArgumentError(
                f"load_models_to_device names {', '.join(map(repr, unknown))}; known: {', '.join(ON_DEVICE)}."
            )
        with self._alone():
            self._residency.enter(*(ON_DEVICE[name] for name in names))

    def enable_cpu_offload(self) -> None:
        """Let all weights rest on the host; each network comes to the device for its phase."""
        with self._resting():
            self._memory.rest_on_host()


def _lazy(video: Iterable[Image]) -> LazyVideo:
    frames: Any = list(video) if isinstance(video, Iterator) else video
    if not len(frames):
        raise ArgumentError("input_video holds no frame.")
    width, height = frames[0].size

    def read() -> Iterator[Tensor]:
        return (plane[None, :, None] for plane in normalised_frames(frames, height, width))

    return LazyVideo((1, 3, len(frames), height, width), read)

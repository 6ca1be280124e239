"""Prompts and other inputs in, videos out: one pipeline for every Wan model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Contribution, Merged, merge
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.denoising.expert import Experts
from diffsynth.denoising.loop import Guidance, denoise
from diffsynth.errors import ArgumentError, MissingModelError
from diffsynth.models.download import looks_like_id
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.components import PipelineComponents, collect
from diffsynth.pipelines.describe import describe
from diffsynth.pipelines.request import VideoRequest, call_signature, read_request
from diffsynth.sampling.registry import SAMPLERS
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.schedule import add_noise
from diffsynth.video import tensor_to_frames, to_pil
from diffsynth.vram_management.residency import Residency

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Videos = list[Image] | list[list[Image]] | Tensor | NDArray[np.float32]

logger = logging.getLogger("diffsynth")
Precision = Literal["official", "v1"]


class WanVideoPipeline:
    """Turns a request into a video; see `__call__`.

    Args:
        parts: the networks; usually found by `from_model_manager` or `from_pretrained`.
        precision: "official" keeps latents in float32 and rounds pixels; "v1" reproduces DiffSynth v1's
            arithmetic (latents and timesteps in the pipeline's dtype, tiled VAE, pixels cut to 8 bits) for
            people with old seeds.
    """

    def __init__(self, parts: PipelineComponents, precision: Precision = "official") -> None:
        if precision not in ("official", "v1"):
            raise ArgumentError(f"precision is {precision!r}; known: 'official', 'v1'.")
        self.parts, self.precision = parts, precision
        self.last_settings: Mapping[str, object] = {}  # of the last call, with defaults and seed filled in
        self._residency = Residency(parts.networks(), parts.device)
        self._is_interrupted = False

    @classmethod
    def from_model_manager(
        cls,
        model_manager: ModelManager,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        use_usp: bool = False,
        *,
        dit: str | Path | Sequence[str | Path] | None = None,
        tokenizer_path: str | Path | None = None,
        precision: Precision = "official",
    ) -> WanVideoPipeline:
        """Use the networks that a manager loaded.

        Args:
            model_manager: holds them.
            torch_dtype: of intermediate results; None: the manager's.
            device: where they compute; None: the manager's. Networks that rest elsewhere visit it for their
                phase.
            use_usp: several GPUs for one video; not in this version.
            dit: which of several loaded DiTs, by file; two for a high- and a low-noise expert.
            tokenizer_path: file or folder, when the tokenizer does not lie beside the text encoder.
            precision: see the class.
        """
        if use_usp:
            raise ArgumentError(
                "use_usp=True: several GPUs for one video are not in this version; leave it out."
            )
        place = torch.device(model_manager.device if device is None else device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(
                f"device is {str(place)!r} but this machine has no usable CUDA GPU; give device='cpu'."
            )
        dtype = torch_dtype or model_manager.torch_dtype or torch.float32
        parts = collect(model_manager, device=place, dtype=dtype, dit=dit, tokenizer_path=tokenizer_path)
        return cls(parts, precision)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Sequence[str | Path],
        torch_dtype: torch.dtype | None = torch.bfloat16,
        device: str | torch.device | None = None,
        *,
        download: bool = False,
        dit: str | Path | Sequence[str | Path] | None = None,
        tokenizer_path: str | Path | None = None,
        precision: Precision = "official",
    ) -> WanVideoPipeline:
        """Load a folder (official, diffusers), a list of files, or a hub id; every part is found by itself.

        Args:
            path: where the networks are.
            torch_dtype: of weights and intermediate results; None keeps each file's own.
            device: None is "cuda" if there is one, else "cpu".
            download: allow a hub id to be downloaded; without it nothing reaches the network.
            dit: see `from_model_manager`.
            tokenizer_path: see `from_model_manager`.
            precision: see the class.
        """
        manager = ModelManager(torch_dtype=torch_dtype, device=device)
        is_id = isinstance(path, str) and not Path(path).expanduser().exists() and looks_like_id(path)
        if is_id and download:
            from diffsynth.models.download import download_models

            path = cast("list[str | Path]", download_models([str(path)]))
        elif is_id:
            raise ArgumentError(
                f"{path!r} is no file or folder here; if it is an id on a hub, allow the download with "
                "download=True (--download on the command line)."
            )
        manager.load_models(path)
        return cls.from_model_manager(manager, dit=dit, tokenizer_path=tokenizer_path, precision=precision)

    @property
    def dit(self) -> nn.Module | None:
        """The DiT, or the high-noise expert."""
        return None if self.parts.high is None else self.parts.high.dit

    @property
    def dit2(self) -> nn.Module | None:
        """The low-noise expert."""
        return None if self.parts.low is None else self.parts.low.dit

    @property
    def vae(self) -> nn.Module | None:
        """The video VAE."""
        return self.parts.vae

    @property
    def text_encoder(self) -> nn.Module | None:
        """The text encoder."""
        return self.parts.text_encoder

    @property
    def device(self) -> torch.device:
        """Where networks compute."""
        return self.parts.device

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of intermediate results."""
        return self.parts.dtype

    def describe(self) -> str:
        """What is loaded, what inputs it reads and which defaults a call has."""
        return describe(self.parts, self.precision)

    def interrupt(self) -> None:
        """Stop the running call after its current step; it returns what the latents show by then."""
        self._is_interrupted = True

    @torch.no_grad()
    def __call__(self, prompt: Any = None, negative_prompt: Any = None, **arguments: Any) -> Videos:
        """Make videos. ``help(pipe)`` lists the arguments; the fields of ``Inputs`` tell their meaning.

        Returns:
            A list of PIL frames, or a list of such lists when a batch was asked for (a list of prompts, or
            num_videos_per_prompt > 1). With output_type "pt" float32 (B, F, 3, H, W) in [0, 1], "np" (B, F,
            H, W, 3), "latent" the float32 latents (B, C, F, H, W) that the VAE would decode.

        Raises:
            UnknownArgumentError, UnusedInputError, ArgumentError: before any model moves.
            MissingModelError: when a network is needed that is not loaded.
            NotFiniteError: when latents become NaN; says at which step.
        """
        self._is_interrupted = False
        request = read_request(
            {"prompt": prompt, "negative_prompt": negative_prompt, **arguments}, self.parts, self.precision
        )
        if self.parts.high is None:
            raise MissingModelError(
                "No DiT is loaded; load one (Wan2.1-T2V-1.3B's diffusion_pytorch_model.safetensors)."
            )
        if self.parts.vae is None and request.options.output_type != "latent":
            raise MissingModelError("No VAE is loaded; load Wan2.1_VAE.pth, or ask for output_type='latent'.")
        sampler = _prepared_sampler(request)
        noise, seed = _draw_noise(request)
        self.last_settings = {**request.settings, **({} if seed is None else {"seed": seed})}
        conditions = self._encode(request)
        latents = self._denoise(request, conditions, sampler, noise)
        if request.options.output_type == "latent":
            return latents
        return self._decode(request, latents)

    def _encode(self, request: VideoRequest) -> Merged:
        """Lines 2 to 4 of a generation: each encoder comes in once."""
        contributions: dict[str, Contribution] = {}
        encoders = dict.fromkeys(CONDITIONERS[name].encoder for name in request.inputs)
        for encoder in encoders:
            with self._residency.use(*(() if encoder is None else (encoder,))):
                for name, inputs in request.inputs.items():
                    if CONDITIONERS[name].encoder == encoder:
                        contributions[name] = CONDITIONERS[name].encode(inputs, request.geometry, self.parts)
        return merge(contributions)

    def _denoise(self, request: VideoRequest, conditions: Merged, sampler: Sampler, noise: Tensor) -> Tensor:
        assert self.parts.high is not None
        options, plan, device = request.options, conditions.latents, self.parts.device
        latents = noise.to(device)
        if plan.start is not None:
            latents = add_noise(plan.start.to(device, torch.float32), latents, sampler.sigmas[0].to(device))
        is_v1 = self.precision == "v1"
        latents = plan.pin(latents.to(self.parts.dtype if is_v1 else torch.float32))
        boundary = self.parts.boundary if options.switch_DiT_boundary is None else options.switch_DiT_boundary
        experts = Experts(self.parts.high, self.parts.low, boundary, options.step_cache)
        with self._residency.use("dit", "dit_low_noise"):
            latents = denoise(
                experts, sampler, latents, positive=conditions.positive, negative=conditions.negative,
                plan=plan, guidance=Guidance(high=request.cfg_scale, low=request.cfg_scale_low_noise),
                on_step=self._on_step(options.callback_on_step_end), progress=options.progress_bar_cmd,
                timestep_dtype=self.parts.dtype if is_v1 else None,
            )  # fmt: skip
        return plan.trim(latents).float()

    def _on_step(
        self, callback: Callable[..., Mapping[str, Tensor] | None] | None
    ) -> Callable[[int, Tensor, Tensor], Tensor | None]:
        def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
            if callback is not None:
                changed = callback(self, step, timestep, {"latents": latents})
                latents = latents if changed is None else changed.get("latents", latents)
            if self._is_interrupted:
                logger.info("Stopped after step %d.", step + 1)
                return None
            return latents

        return on_step

    def _decode(self, request: VideoRequest, latents: Tensor) -> Videos:
        with self._residency.use("vae"):
            decoded = (self._decode_one(one, request) for one in torch.split(latents, 1))
            if request.options.output_type == "pil":
                rounding: Literal["round", "truncate"] = "truncate" if self.precision == "v1" else "round"
                videos = [to_pil(tensor_to_frames(video, rounding)[0]) for video in decoded]
                return videos if request.is_batch else videos[0]
            stacked = torch.cat([video.add_(1).div_(2).transpose(1, 2).cpu() for video in decoded])
        return stacked if request.options.output_type == "pt" else stacked.movedim(2, -1).numpy()

    def _decode_one(self, latents: Tensor, request: VideoRequest) -> Tensor:
        """(1, C, F, H, W) -> (1, 3, F, H, W) float32 in [-1, 1]."""
        assert self.parts.vae is not None
        vae, options = self.parts.vae, request.options
        if not options.tiled:
            try:
                return vae.decode(latents).clamp_(-1, 1)
            except torch.OutOfMemoryError:
                logger.warning(
                    "Out of memory while decoding the whole picture; decoding in tiles of %s.",
                    options.tile_size,
                )
        return vae.decode(latents, tile_size=options.tile_size, tile_stride=options.tile_stride).clamp_(-1, 1)


WanVideoPipeline.__call__.__signature__ = call_signature()  # type: ignore[attr-defined]


def _prepared_sampler(request: VideoRequest) -> Sampler:
    options = request.options
    sampler = SAMPLERS[str(options.sampler)]()
    if options.sigmas is not None:
        sampler.set_sigmas(options.sigmas, options.timesteps)
    else:
        assert options.num_inference_steps is not None and options.sigma_shift is not None
        sampler.reset(options.num_inference_steps, options.sigma_shift, request.denoising_strength)
    return sampler


def _draw_noise(request: VideoRequest) -> tuple[Tensor, int | None]:
    """Noise (B, C, F, H, W) float32 and the seed it came from (None when the caller gave the noise)."""
    options, shape = request.options, request.geometry.latent_shape
    if options.latents is not None:
        if options.seed is not None:
            raise ArgumentError(
                "seed and latents are both given; latents are the noise that a seed would draw."
            )
        if tuple(options.latents.shape) != shape:
            raise ArgumentError(
                f"latents have shape {tuple(options.latents.shape)}; this request needs {shape}."
            )
        return options.latents.float(), None
    seed = options.seed
    if seed is None:
        seed = int(torch.randint(0, 2**31 - 1, ()))
        logger.info("seed=%d was drawn.", seed)
    rows = []
    try:
        generator = torch.Generator(options.rand_device)
    except RuntimeError as error:
        raise ArgumentError(
            f"rand_device is {options.rand_device!r}; give 'cpu', or 'cuda' where there is a GPU."
        ) from error
    for index in range(shape[0]):
        # float32 on the CPU whatever the device, unless asked otherwise: one seed, one video, on every
        # machine.
        generator.manual_seed(seed + index)
        rows.append(torch.randn((1, *shape[1:]), generator=generator, device=options.rand_device))
    return torch.cat(rows), seed

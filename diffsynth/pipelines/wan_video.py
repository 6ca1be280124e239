"""Prompts and other inputs in, videos out: one pipeline for every Wan model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffsynth.conditioning.conditions import LatentPlan, Merged
from diffsynth.denoising.expert import Experts
from diffsynth.denoising.guidance import Guidance, classifier_free
from diffsynth.denoising.loop import OnStep, denoise, steps_of
from diffsynth.errors import ArgumentError, BusyPipelineError, MissingModelError
from diffsynth.models.download import local_paths
from diffsynth.models.model_manager import ModelManager
from diffsynth.ops.devices import known_device
from diffsynth.ops.fp8 import Compute
from diffsynth.pipelines.components import PipelineComponents, collect
from diffsynth.pipelines.course import Course, plot_course
from diffsynth.pipelines.decoding import VideoDecoder
from diffsynth.pipelines.describe import describe, describe_memory
from diffsynth.pipelines.encoding import EncodingSession, encode_request
from diffsynth.pipelines.experts import ExpertMethods, boundary_of, require_experts, step_counts
from diffsynth.pipelines.from_configs import arrange, load_configs, refuse_audio
from diffsynth.pipelines.kernels import choose_kernels
from diffsynth.pipelines.loras import LoRAMethods
from diffsynth.pipelines.memory import MemoryLimits, MemoryManager
from diffsynth.pipelines.model_config import ModelConfig
from diffsynth.pipelines.networks import NetworkAttributes
from diffsynth.pipelines.noise import draw_noise
from diffsynth.pipelines.options import CallOptions
from diffsynth.pipelines.remarks import make_remarks
from diffsynth.pipelines.request import VideoRequest, call_signature, read_request
from diffsynth.pipelines.run_facts import without_iterators
from diffsynth.pipelines.rungs import Tiling
from diffsynth.pipelines.saved_latents import KeptLatents, keep_latents, latents_kept, provenance
from diffsynth.pipelines.v1_methods import V1Methods
from diffsynth.sampling.sampler import Sampler
from diffsynth.sampling.schedule import add_noise
from diffsynth.vram_management.memory_plan import MemoryPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffsynth.pipelines.decoding import OutputType, Videos
    from diffsynth.pipelines.typed_call import call

__all__ = ["ModelConfig", "WanVideoPipeline"]

logger = logging.getLogger("diffsynth")
NO_USP = "use_usp=True: several GPUs for one video are not in this version; leave it out."
Precision = Literal["official", "v1"]


class WanVideoPipeline(NetworkAttributes, LoRAMethods, ExpertMethods, V1Methods):
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
        self._memory = MemoryManager(parts)
        self._residency = self._memory.residency
        self._is_interrupted = False
        self._fits_itself = False  # `enable_vram_management` without a limit means what is free
        self._in_use = Lock()
        parts.loras.guard(self._resting)

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
            raise ArgumentError(NO_USP)
        place = known_device(model_manager.device if device is None else device)
        dtype = torch_dtype or model_manager.torch_dtype or torch.float32
        parts = collect(model_manager, device=place, dtype=dtype, dit=dit, tokenizer_path=tokenizer_path)
        return cls(parts, precision)

    @classmethod
    def from_pretrained(  # noqa: PLR0913  (the keywords of two libraries)
        cls,
        path: str | Path | Sequence[str | Path] | None = None,
        torch_dtype: torch.dtype | None = torch.bfloat16,
        device: str | torch.device | None = None,
        *,
        download: bool = False,
        dit: str | Path | Sequence[str | Path] | None = None,
        tokenizer_path: str | Path | None = None,
        precision: Precision = "official",
        vram_limit: float | Literal["auto"] | None = None,
        model_configs: Sequence[ModelConfig] | None = None,
        tokenizer_config: ModelConfig | None = None,
        audio_processor_config: ModelConfig | None = None,
        redirect_common_files: bool = True,
        use_usp: bool = False,
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
            vram_limit: see `enable_vram_management`; 0 streams all that can be.
            model_configs: in place of ``path``: the models one by one, as DiffSynth-Studio 1.1.8 and 2.x name
                them.
            tokenizer_config: with ``model_configs``: the tokenizer, when it does not lie beside the text
                encoder.
            audio_processor_config: of speech to video, which is not in this version.
            redirect_common_files: with ``model_configs``: text encoder, VAE and CLIP may be the copies that
                lie in another repository's folder.
            use_usp: see `from_model_manager`.
        """
        if use_usp:
            raise ArgumentError(NO_USP)
        if (path is None) == (model_configs is None):
            raise ArgumentError("Give path=, or model_configs=[ModelConfig(...), ...]: one of them.")
        if isinstance(path, torch.dtype):
            raise ArgumentError(f"path is {path}; give torch_dtype= and what follows it by their names.")
        if path is not None:
            if tokenizer_config is not None:
                raise ArgumentError("tokenizer_config= belongs to model_configs=; give tokenizer_path=.")
            manager = ModelManager(torch_dtype=torch_dtype, device=device)
            manager.load_models(local_paths(path, download=download))
            arrangement = arrange([], torch_dtype, manager.device, vram_limit)
        else:
            manager, arrangement, tokenizer_path = load_configs(
                model_configs or (), torch_dtype=torch_dtype, device=device, vram_limit=vram_limit,
                tokenizer_config=tokenizer_config, tokenizer_path=tokenizer_path, download=download,
                redirect_common_files=redirect_common_files,
            )  # fmt: skip
        refuse_audio(audio_processor_config)
        pipe = cls.from_model_manager(manager, dit=dit, tokenizer_path=tokenizer_path, precision=precision)
        pipe._fits_itself = model_configs is not None
        if arrangement.fp8_compute:
            pipe.choose_kernels(fp8_compute="fp8")
        if not arrangement.limits.is_free and (pipe.parts.high is not None or vram_limit):
            pipe._limit(arrangement.limits)
        return pipe

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """The plan of the last call, or of `enable_vram_management`; None without limits."""
        return self._memory.plan

    def enable_vram_management(
        self,
        num_persistent_param_in_dit: int | None = None,
        vram_limit: float | Literal["auto"] | None = None,
        ram_limit: float | None = None,
        *,
        vram_buffer: float | None = None,
    ) -> None:
        """Run within less memory: blocks that do not fit are streamed from the host just ahead of their use.

        Every call is planned by its own sizes; `memory_plan` and ``diffsynth plan`` show the plan. Called
        again, the new limits replace the old ones. With no limit at all each network comes to the device for
        its phase as a whole, as it does without this call; in a pipeline made of ``model_configs=`` on a GPU
        that is "auto", as in DiffSynth-Studio 1.1.8.

        Args:
            num_persistent_param_in_dit: about so many parameters of each DiT stay on the device, spread
                evenly through its depth; 0 streams every block, more than there are keeps all.
            vram_limit: GiB of the device that a call may use; "auto" is what is free when it begins.
            ram_limit: GiB of host memory for resting weights; where they do not fit, blocks are read from
                their file through a small ring.
            vram_buffer: GiB of ``vram_limit`` that are left free.

        Raises:
            MemoryBudgetError: when the model's usual sizes do not fit; says the minimum and what lowers it.
            ArgumentError: for values that cannot work.
        """
        is_left_open = num_persistent_param_in_dit is None and vram_limit is None
        if is_left_open and self.device.type == "cuda" and (self._fits_itself or vram_buffer is not None):
            vram_limit = "auto"
        limits = MemoryLimits(
            num_persistent_param_in_dit=num_persistent_param_in_dit, vram_limit=vram_limit,
            ram_limit=ram_limit, vram_buffer=vram_buffer,
        )  # fmt: skip
        self._limit(limits)

    def _limit(self, limits: MemoryLimits) -> None:
        with self._alone():
            self._memory.limit(limits)
        if self.memory_plan is not None:
            logger.info("\n".join(describe_memory(self.memory_plan)))

    def disable_vram_management(self) -> None:
        """Undo `enable_vram_management`: plain networks, which come for their phase as a whole."""
        with self._alone():
            self._memory.release()

    def choose_kernels(self, attention: str | None = None, fp8_compute: Compute | None = None) -> None:
        """Choose how the DiTs multiply, in place of the automatic choice; `describe` shows it.

        Args:
            attention: name of a kernel, such as "flash3"; ``diffsynth doctor`` lists them. None: by device
                and shapes, among exact kernels.
            fp8_compute: of weights kept in fp8: "widened" to bfloat16, or multiplied as "fp8" where the GPU
                can: faster, and rounds activations too. None: widened.

        Raises:
            ArgumentError: for a kernel that is unknown or not available here; lists those that are.
        """
        with self._alone():
            choose_kernels(self.parts, attention, fp8_compute)

    def describe(self) -> str:
        """What is loaded, how it computes, what inputs it reads and which defaults a call has."""
        return describe(self.parts, self.precision, self.memory_plan, self._residency.locked_bytes())

    def interrupt(self) -> None:
        """Stop the running call after its current step; it returns what the latents show by then."""
        self._is_interrupted = True

    if TYPE_CHECKING:  # every argument with its type, by the declarations of their readers
        __call__ = call
    else:

        @torch.no_grad()
        def __call__(self, prompt: Any = None, negative_prompt: Any = None, **arguments: Any) -> Videos:
            """Make videos. ``help(pipe)`` lists the arguments; the fields of ``Inputs`` tell their meaning.

            Returns:
                A list of PIL frames, or a list of such lists when a batch was asked for (a list of prompts,
                or num_videos_per_prompt > 1). With output_type "pt" float32 (B, F, 3, H, W) in [0, 1], "np"
                (B, F, H, W, 3), "latent" the float32 latents (B, C, F, H, W) that the VAE would decode.

            Raises:
                UnknownArgumentError, UnusedInputError, ArgumentError: before any model moves.
                MissingModelError: when a network is needed that is not loaded.
                NotFiniteError: when latents become NaN; says at which step.
            """
            with self._alone():
                return self._generate({"prompt": prompt, "negative_prompt": negative_prompt, **arguments})

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        output_type: OutputType = "pil",
        tiled: bool | None = None,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> Videos:
        """Make videos of latents (B, C, T, h, w), as the end of a call does; only the VAE must be loaded.

        Raises:
            ArgumentError: for latents or tiles that this VAE cannot take.
            MissingModelError: without a VAE.
            torch.OutOfMemoryError: when neither tiles nor the CPU has room, or ``tiled=False`` forbids them.
        """
        if output_type not in ("pil", "pt", "np"):
            raise ArgumentError(f"output_type is {output_type!r}; known: pil, pt, np.")
        decoder = self._decoder(latents, Tiling(tiled, tile_size, tile_stride))
        with self._alone(), self._residency.use("vae"):
            return decoder.videos(latents, output_type, is_batch=latents.shape[0] > 1)

    def decode_stream(
        self,
        latents: Tensor,
        *,
        tiled: bool | None = None,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames (H, W, 3) of one video (1, C, T, h, w) as they are decoded; see `decode`.

        ``save_video(pipe.decode_stream(latents), PATH)`` writes a video of any length with the same memory,
        unless it is decoded in tiles: those keep 12 bytes per pixel and frame.
        """
        decoder = self._decoder(latents, Tiling(tiled, tile_size, tile_stride))
        if latents.shape[0] != 1:
            raise ArgumentError(f"latents hold {latents.shape[0]} videos; give one: latents[i : i + 1].")
        return self._stream(decoder, latents)

    @contextmanager
    def encoding(self, *networks: str) -> Iterator[EncodingSession]:
        """Encode the conditions of many calls, with these networks on the device all the while."""
        with self._alone(), self._residency.use(*networks):
            try:
                yield EncodingSession(self.parts, self.precision, self._residency, networks)
            finally:
                self._residency.enter()  # all go to rest

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise BusyPipelineError(
                "This pipeline is in a call already, of another thread or a callback; wait for its end, or "
                "make a second pipeline from the same manager."
            )
        try:
            yield
        finally:
            self._in_use.release()

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """Between calls, with plain networks: for a change of their layers."""
        with self._alone(), self._memory.suspended():
            yield

    def _generate(self, arguments: Mapping[str, object]) -> Videos:
        self._is_interrupted = False
        arguments = without_iterators(arguments)
        request = read_request(arguments, self.parts, self.precision)
        if self.parts.high is None:
            raise MissingModelError(
                "No DiT is loaded; load one (Wan2.1-T2V-1.3B's diffusion_pytorch_model.safetensors)."
            )
        if self.parts.vae is None and request.options.output_type != "latent":
            raise MissingModelError(
                f"No VAE is loaded; load {self.parts.facts.vae_file}, or ask for output_type='latent'."
            )
        require_experts(self.parts, request.options)
        sampler = request.sampler
        make_remarks(request, self.parts)
        self.scheduler.read(sampler.sigmas, sampler.timesteps)
        self.parts.loras.begin(*step_counts(self.parts, request.options, sampler))
        course = plot_course(request, arguments, self.parts, self.precision, sampler)
        self.parts.loras.advance(course.first_step)
        self.last_settings = {**request.settings, **({} if course.seed is None else {"seed": course.seed})}
        self._memory.prepare(request)
        conditions = encode_request(request, self.parts, self._residency)
        latents = course.latents
        if latents is None:
            latents = self._noisy(request, conditions.latents, course.seed, sampler)
        return self._decode(request, self._denoise(request, conditions, sampler, latents, course))

    def _noisy(self, request: VideoRequest, plan: LatentPlan, seed: int | None, sampler: Sampler) -> Tensor:
        """Latents at the first noise level."""
        device, is_v1 = self.parts.device, self.precision == "v1"
        latents = draw_noise(request, seed, plan.extra_frames).to(device)
        if plan.start is not None:
            latents = add_noise(plan.start.to(device, torch.float32), latents, sampler.sigmas[0].to(device))
        return plan.pin(latents.to(self.parts.dtype if is_v1 else torch.float32))

    def _denoise(
        self, request: VideoRequest, conditions: Merged, sampler: Sampler, latents: Tensor, course: Course
    ) -> Tensor:
        assert self.parts.high is not None
        options, plan, is_v1 = request.options, conditions.latents, self.precision == "v1"
        experts = Experts(
            self.parts.high, self.parts.low, boundary_of(self.parts, options), options.step_cache,
            bring_in=self._residency.enter, send_ahead=self._residency.send_ahead,
            interleaves=self.memory_plan is None or self.memory_plan.interleaves_branches,
        )  # fmt: skip
        guidance = Guidance(high=request.cfg_scale, low=request.cfg_scale_low_noise)
        branches = classifier_free(conditions.positive, conditions.negative, guidance)
        steps = steps_of(
            sampler, experts, latents.shape, num_pinned=plan.num_pinned,
            timestep_dtype=self.parts.dtype if is_v1 else None,
        )[course.first_step :]  # fmt: skip
        if not steps:
            return plan.trim(latents).float()  # a run that was killed behind its last step
        experts.begin(steps[0].count, len(branches))
        if options.step_cache is not None and course.cache_memory is not None:
            options.step_cache.restore(course.cache_memory)
        with course.telling(), self._residency.use(*experts.networks_of(steps[0])):
            latents = denoise(
                experts, sampler, latents, steps=steps, branches=branches, plan=plan,
                on_step=self._on_step(options, experts, sampler, course), progress=options.progress_bar_cmd,
            )  # fmt: skip
        return plan.trim(latents).float()

    def _on_step(self, options: CallOptions, experts: Experts, sampler: Sampler, course: Course) -> OnStep:
        def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
            if options.callback_on_step_end is not None:
                changed = options.callback_on_step_end(self, step, timestep, {"latents": latents})
                latents = latents if changed is None else changed.get("latents", latents)
            course.after_step(step, latents, sampler, is_last=self._is_interrupted)
            if self._is_interrupted:
                logger.info("Stopped after step %d.", step + 1)
                return None
            if self.parts.loras.advance(step + 1):
                experts.forget()
            return latents

        return on_step

    def _decode(self, request: VideoRequest, latents: Tensor) -> Videos:
        """Latents are on the disk, if asked for, before the VAE is."""
        options = request.options
        kept: tuple[KeptLatents, ...] = ()
        if options.save_latents is not None:
            settings = provenance(self.parts, self.precision, self.last_settings)
            kept = (keep_latents(Path(options.save_latents), latents, self.parts, settings),)
        if options.output_type == "latent":
            return latents
        decoder = self._decoder(latents, Tiling(options.tiled, options.tile_size, options.tile_stride))
        with latents_kept(*kept), self._residency.use("vae"):
            return decoder.videos(latents, options.output_type, is_batch=request.is_batch)

    def _decoder(self, latents: Tensor, tiling: Tiling) -> VideoDecoder:
        by_plan = self.memory_plan is not None and self.memory_plan.tiled_vae
        return VideoDecoder.of(self.parts, self.precision, tiling, latents, tiled_by_plan=by_plan)

    @torch.no_grad()
    def _stream(self, decoder: VideoDecoder, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
        with self._alone(), self._residency.use("vae"):
            yield from decoder.frames(latents)


WanVideoPipeline.__call__.__signature__ = call_signature()  # type: ignore[attr-defined]

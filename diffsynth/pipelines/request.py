"""A call of the pipeline, checked whole before any model moves."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from numbers import Integral
from types import MappingProxyType
from typing import Any

from diffsynth.announce import announce
from diffsynth.conditioning.argument import names_read
from diffsynth.conditioning.conditioner import Geometry, SizeChecker, read_inputs
from diffsynth.conditioning.image import size_nearest, size_within
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.conditioning.text import TextInputs
from diffsynth.denoising.step_cache import StepCache
from diffsynth.errors import ArgumentError, UnknownArgumentError
from diffsynth.pipelines.argument_checks import check_embeds, check_numbers, check_seed, check_types
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.foreign_arguments import ADVERTISED, without_foreign
from diffsynth.pipelines.options import OUTPUT_TYPES, CallOptions, call_arguments, readers_of_calls
from diffsynth.pipelines.presets import preset_values
from diffsynth.pipelines.rungs import Tiling
from diffsynth.pipelines.saved_latents import check_latents_path, model_files
from diffsynth.pipelines.saved_steps import check_steps_path
from diffsynth.pipelines.unread import refuse_unread, refuse_unreadable, require_encoder, why_unread
from diffsynth.pipelines.usual import usual_values_of
from diffsynth.sampling.registry import SAMPLERS, sampler_for
from diffsynth.sampling.sampler import Sampler
from diffsynth.video import picture_size
from diffsynth.video.paths import check_not_read
from diffsynth.video.settings import check_text

logger = logging.getLogger("diffsynth")

TEMPORAL_STRIDE = 4
# along time, height or width: the length of Wan's own table of positions (wan/modules/model.py)
MAX_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """Everything a call asks for, with defaults filled in and sizes snapped."""

    options: CallOptions
    inputs: Mapping[str, Any]  # conditioner name -> its Inputs, those that apply
    geometry: Geometry
    num_videos: int
    is_batch: bool  # a list of prompts, or several videos per prompt: the result is a list of videos
    cfg_scale: float
    cfg_scale_low_noise: float
    denoising_strength: float
    sampler: Sampler  # set to the noise levels
    settings: Mapping[str, object]  # what was asked and resolved, plain values: goes into the file's metadata

    @property
    def extra_frames(self) -> int:
        """Latent frames in front of the video's, told by the Inputs that put them there."""
        return sum(getattr(inputs, "extra_frames", 0) for inputs in self.inputs.values())


@cache
def known_arguments() -> Mapping[str, tuple[object, object]]:
    """Every argument of ``pipe()`` with its annotation and default, prompts first. Read only."""
    arguments = call_arguments()
    known: dict[str, tuple[object, object]] = {
        name: (arguments[name].type, arguments[name].default) for name in names_read(readers_of_calls())
    }
    for name, default in ADVERTISED.items():
        known[name] = ("object", default)
    return MappingProxyType(known)


def call_signature() -> inspect.Signature:
    """The signature of ``pipe()``, told by the dataclasses of its readers."""
    kinds = inspect.Parameter
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    for name, (annotation, default) in known_arguments().items():
        kind = kinds.POSITIONAL_OR_KEYWORD if name in ("prompt", "negative_prompt") else kinds.KEYWORD_ONLY
        parameters.append(kinds(name, kind, default=default, annotation=annotation))
    return inspect.Signature(sorted(parameters, key=lambda p: p.kind))


def read_request(arguments: Mapping[str, object], parts: PipelineComponents, precision: str) -> VideoRequest:
    """Check a call and fill in defaults; raises before any model moves.

    Raises:
        UnknownArgumentError: for an argument that nothing reads; names the nearest.
        UnusedInputError: for an input that the loaded models cannot use.
        ArgumentError: for values that cannot work.
    """
    given = _known_only(arguments)
    check_numbers(given)
    check_types(given)
    _check_grid(given)
    resolved = {k: v for k, v in usual_values(parts).items() if k in known_arguments()}
    if given.get("cfg_scale") is not None:
        resolved.pop("cfg_scale_low_noise", None)  # the caller's scale is meant for both experts
    resolved.update(preset_values(given))
    resolved.update({k: v for k, v in given.items() if v is not None})
    resolved.update(_sizes_of_picture(given, parts))
    resolved.update(_resize_of_v1(given, precision))
    options = _tiling(read_inputs(CallOptions, resolved), precision)
    _check_options(options, resolved)
    resolved.update(tile_size=options.tile_size if options.tiled else None,
                    tile_stride=options.tile_stride if options.tiled else None)  # fmt: skip
    text: TextInputs = read_inputs(TextInputs, resolved)
    for name in ("prompt", "negative_prompt"):
        check_text(name, resolved.get(name))
    check_embeds(text, parts)
    num_videos = text.num_prompts * text.num_videos_per_prompt
    check_seed(options.seed, num_videos)
    strength = float(str(resolved.get("denoising_strength", 1.0)))
    sampler = _sampler(options, strength)
    geometry = _geometry(options, parts, num_videos, len(sampler.timesteps))
    _check_written(options, geometry, parts)
    refuse_unreadable(given, parts.facts)
    inputs = {}
    for name, conditioner in CONDITIONERS.items():
        own = read_inputs(conditioner.Inputs, resolved)
        if conditioner.applies(own, parts):
            inputs[name] = own
            require_encoder(conditioner, own, parts)
            if isinstance(conditioner, SizeChecker):
                conditioner.check(own, geometry, parts)
    readers: list[type] = [CallOptions, *(type(own) for own in inputs.values())]
    refuse_unread(
        {name: value for name, value in given.items() if value is not None},
        {name: default for name, (_, default) in known_arguments().items()},
        readers, why_unread(given, resolved, parts),
    )  # fmt: skip
    is_list = text.prompt_embeds is None and not isinstance(text.prompt, str)
    sizes: dict[str, Any] = {name: getattr(geometry, name) for name in ("height", "width", "num_frames")}
    return VideoRequest(
        options=replace(options, **sizes),
        inputs=inputs,
        geometry=geometry,
        num_videos=num_videos,
        is_batch=is_list or num_videos > 1,
        cfg_scale=text.cfg_scale,
        cfg_scale_low_noise=text.cfg_scale if text.cfg_scale_low_noise is None else text.cfg_scale_low_noise,
        denoising_strength=strength,
        sampler=sampler,
        settings=_plain({**resolved, **sizes}),
    )


def usual_values(parts: PipelineComponents) -> dict[str, object]:
    """What arguments are when nobody gives them: the checkpoint's, the official, v1's, in this order."""
    return usual_values_of(
        parts.family, has_two_experts=parts.low is not None, is_22=parts.facts.holds_first_frame,
        told=parts.generation,
    )  # fmt: skip


def _known_only(arguments: Mapping[str, object]) -> dict[str, object]:
    known = known_arguments()
    given = {}
    for name, value in without_foreign(arguments).items():
        if name not in known:
            raise UnknownArgumentError(name, known)
        given[name] = value
    return given


def _check_grid(given: Mapping[str, object]) -> None:
    if given.get("sigmas") is None:
        if given.get("timesteps") is not None:
            raise ArgumentError(
                "timesteps= was given without sigmas=; it tells the network what to read at each of them."
            )
        return
    replaced = [n for n in ("num_inference_steps", "sigma_shift") if given.get(n) is not None]
    if given.get("denoising_strength") not in (None, 1.0):
        replaced.append("denoising_strength")
    if replaced:
        raise ArgumentError(f"sigmas= replaces {' and '.join(replaced)}; give one or the other.")


def _check_options(options: CallOptions, resolved: Mapping[str, object]) -> None:
    if options.sampler not in SAMPLERS:
        raise ArgumentError(f"sampler is {options.sampler!r}; known: {', '.join(SAMPLERS)}.")
    if options.output_type not in OUTPUT_TYPES:
        raise ArgumentError(f"output_type is {options.output_type!r}; known: {', '.join(OUTPUT_TYPES)}.")
    steps = options.num_inference_steps  # of the checkpoint or a preset, where the caller gives none
    if options.sigmas is None and (not isinstance(steps, Integral) or steps < 1):
        raise ArgumentError(f"num_inference_steps is {steps}; give 1 or more (50 is usual).")
    if options.step_cache is not None and not isinstance(options.step_cache, StepCache):
        raise ArgumentError(
            f"step_cache is a {type(options.step_cache).__name__} without begin, answer, recall, keep, state "
            "and restore, which are told the step and the side of the guidance in place of a key; see "
            "diffsynth/denoising/step_cache.py."
        )
    boundary = options.switch_DiT_boundary
    if boundary is not None and not 0.0 <= boundary <= 1.0:
        raise ArgumentError(f"switch_DiT_boundary is {boundary}; give 0 to 1 (0.875 for T2V-A14B).")


def _resize_of_v1(given: Mapping[str, object], precision: str) -> dict[str, object]:
    """v1 stretched pictures to height and width, and so does ``precision="v1"`` unless the call says else."""
    is_fitted = any(given.get(name) is not None for name in ("input_image", "end_image", "reference_image"))
    if precision != "v1" or not is_fitted or not all(given.get(n) is None for n in ("resize", "max_area")):
        return {}
    return {"resize": "stretch"}


def _check_written(options: CallOptions, geometry: Geometry, parts: PipelineComponents) -> None:
    if options.save_latents is not None:
        check_latents_path(options.save_latents, prod(geometry.latent_shape))
        steps = [] if options.resume_from is None else [options.resume_from]
        check_not_read(options.save_latents, [*model_files(parts), *steps])
    if options.save_steps is not None:
        check_steps_path(options.save_steps, options.save_every, options.save_latents)
        check_not_read(options.save_steps, model_files(parts))
    elif options.save_every is not None:
        raise ArgumentError("save_every= was given without save_steps=, the file that steps are saved to.")


def _tiling(options: CallOptions, precision: str) -> CallOptions:
    tiling = Tiling(options.tiled, options.tile_size, options.tile_stride)
    tiled = tiling.starts_tiled(precision)
    if tiled is False and (options.tile_size, options.tile_stride) != (None, None):
        # v1 scripts give all three, so that this is no error
        announce("tile_size and tile_stride are not read: tiled is False.")
    return replace(options, tiled=tiled, tile_size=tiling.size, tile_stride=tiling.stride)


def size_multiples(parts: PipelineComponents) -> tuple[int, int]:
    """What height and width in pixels are multiples of."""
    stride = parts.spatial_stride
    patch = parts.facts.patch
    return stride * patch[0], stride * patch[1]


def _sizes_of_picture(given: Mapping[str, object], parts: PipelineComponents) -> dict[str, object]:
    """Height and width where ``max_area=`` leaves them to the proportions of ``input_image=``."""
    image: Any = given.get("input_image")
    max_area: Any = given.get("max_area")
    if max_area is None or image is None:  # without a picture the conditioner says what is wrong
        return {}
    if replaced := [name for name in ("height", "width") if given.get(name) is not None]:
        raise ArgumentError(f"max_area= replaces {' and '.join(replaced)}; give one or the other.")
    rule = size_nearest if parts.facts.holds_first_frame else size_within
    height, width = rule(picture_size(image), max_area, size_multiples(parts))
    return {"height": height, "width": width}


def _sampler(options: CallOptions, strength: float) -> Sampler:
    return sampler_for(
        str(options.sampler), num_steps=options.num_inference_steps, shift=options.sigma_shift,
        strength=strength, sigmas=options.sigmas, timesteps=options.timesteps,
    )  # fmt: skip


def _geometry(options: CallOptions, parts: PipelineComponents, num_videos: int, num_steps: int) -> Geometry:
    stride = parts.spatial_stride
    multiples = size_multiples(parts)
    height = _snapped("height", options.height, multiples[0], options.strict)
    width = _snapped("width", options.width, multiples[1], options.strict)
    num_frames = _snapped_frames(options.num_frames, options.strict)
    most = {"height": MAX_TOKENS * multiples[0], "width": MAX_TOKENS * multiples[1],
            "num_frames": TEMPORAL_STRIDE * (MAX_TOKENS - 1) + 1}  # fmt: skip
    for name, value in (("height", height), ("width", width), ("num_frames", num_frames)):
        if value > most[name]:
            raise ArgumentError(f"{name} is {value}; Wan models know positions up to {most[name]}.")
    return Geometry(
        num_videos=num_videos, num_frames=num_frames, height=height, width=width,
        latent_channels=parts.facts.latent_channels,
        latent_frames=(num_frames - 1) // TEMPORAL_STRIDE + 1, latent_height=height // stride,
        latent_width=width // stride, num_steps=num_steps,
    )  # fmt: skip


def _snapped(name: str, value: int | None, multiple: int, strict: bool) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ArgumentError(f"{name} is {value}; give a number of pixels, a multiple of {multiple}.")
    up = -(-value // multiple) * multiple
    if up != value:
        if strict:
            raise ArgumentError(f"{name} is {value}, not a multiple of {multiple}; the next is {up}.")
        logger.warning("%s %d is not a multiple of %d; %d is made instead.", name, value, multiple, up)
    return up


def _snapped_frames(value: int | None, strict: bool) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ArgumentError(f"num_frames is {value}; give 4 k + 1, such as 81 (1 makes a picture).")
    near = (value + 2) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
    if value % TEMPORAL_STRIDE == 1:
        return value
    if strict:
        raise ArgumentError(f"num_frames is {value}, which is not 4 k + 1; the nearest is {near}.")
    logger.warning("num_frames %d is not 4 k + 1; %d are made instead.", value, near)
    return near


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Only what reads as text later: numbers, strings and lists of them."""
    kept: dict[str, object] = {}
    arguments = call_arguments()
    for name, value in values.items():
        if (name not in arguments or "settings" in arguments[name].records) and (
            isinstance(value, (str, int, float))
            or (isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float)) for v in value))
        ):
            kept[name] = value
    return kept

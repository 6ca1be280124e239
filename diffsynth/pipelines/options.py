"""Arguments of ``pipe()`` that are no condition, and the table of all. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from diffsynth.conditioning.argument import GUIDANCE, TILES, VIDEO, Argument, argument, arguments_of
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.conditioning.text import TextInputs

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.denoising.loop import ProgressBar
    from diffsynth.denoising.step_cache import StepCache

OUTPUT_TYPES = ("pil", "pt", "np", "latent")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallOptions:
    """Arguments of ``pipe()`` that are no condition. None means: the model's default."""

    height: int | None = argument(
        None, help="Pixels, a multiple of 16; Wan2.1: 480.", kind="whole", unit="pixels", group=VIDEO,
        refined="anew",
    )  # fmt: skip
    width: int | None = argument(
        None, help="Pixels, a multiple of 16; Wan2.1: 832.", kind="whole", unit="pixels", group=VIDEO,
        refined="anew",
    )  # fmt: skip
    num_frames: int | None = argument(
        None, help="4 k + 1; Wan2.1: 81. 1 makes a picture.", kind="whole", unit="frames", group=VIDEO,
        official=("frame_num",),
    )  # fmt: skip
    num_videos_per_prompt: int = argument(
        1, help="How many, numbered NAME-1, NAME-2 ...; each with a seed one higher.", kind="whole",
        unit="videos", group=VIDEO, records=("settings", "facts"), refined="decided",
    )  # fmt: skip
    preset: str | None = argument(
        None, help="Settings of a step-distilled model or LoRA: lightx2v-4step. Flags given beside it win.",
        kind="text", group=GUIDANCE, refined="anew",
    )  # fmt: skip
    seed: int | None = argument(
        None, help="One number, one video; drawn if not given.", kind="whole", group=VIDEO,
        official=("base_seed",), records=("settings", "file"),
    )  # fmt: skip
    rand_device: str = argument(
        "cpu", help="Where noise is drawn; cpu gives the same video on every machine.", kind="text"
    )
    num_inference_steps: int | None = argument(
        None, help="Calls of the model; Wan2.1: 50.", kind="whole", unit="steps", group=GUIDANCE,
        flags=("--num-inference-steps", "--steps"), official=("sample_steps",), refined="anew",
    )  # fmt: skip
    cfg_scale: float | None = argument(
        None, help="How strongly the prompt pulls; Wan2.1: 5. 1 is no guidance, in half the time.",
        kind="number", group=GUIDANCE, official=("sample_guide_scale",),
    )  # fmt: skip
    cfg_scale_low_noise: float | None = argument(
        None, help="The same for the low-noise expert of a model that has two.", kind="number",
        group=GUIDANCE,
    )  # fmt: skip
    sampler: str | None = argument(
        None, help="How noise becomes video.", kind="text", group=GUIDANCE,
        choices=("euler", "unipc", "dpm++"), official=("sample_solver",),
    )  # fmt: skip
    sigma_shift: float | None = argument(
        None, help="How far noise levels lean to the noisy end: 1 is even, 3 to 12 are usual.",
        kind="number", group=GUIDANCE, official=("sample_shift",),
    )  # fmt: skip
    sigmas: Sequence[float] | Tensor | None = argument(
        None, help="Noise levels, falling, without the final 0; replaces steps and shift.", kind="object"
    )
    timesteps: Sequence[float] | Tensor | None = argument(
        None, help="What the network is told at each of `sigmas`.", kind="object"
    )
    latents: Tensor | None = argument(
        None, help="Initial noise (B, C, F, H, W) float32; replaces the seed.", kind="object"
    )
    switch_DiT_boundary: float | None = argument(
        None, help="Noise level, 0 to 1, where the low-noise expert takes over.", kind="number",
        group=GUIDANCE, flags=("--switch-dit-boundary",),
    )  # fmt: skip
    single_expert: bool = argument(
        False, help="Let one expert of a pair take every step, where the other is not in --model.",
        kind="switch", group=GUIDANCE, flags=("--single-expert",),
    )  # fmt: skip
    tiled: bool | None = argument(
        None, help="Code pictures in tiles, which saves memory; default: where the whole does not fit.",
        kind="switch", group=TILES, flags=("--tiled/--no-tiled",),
    )  # fmt: skip
    tile_size: tuple[int, int] | None = argument(
        None, help="Height and width, 8 pixels each; 30 52.", kind="pair", unit="latent positions",
        group=TILES,
    )  # fmt: skip
    tile_stride: tuple[int, int] | None = argument(
        None, help="From one tile to the next; 15 26.", kind="pair", unit="latent positions", group=TILES
    )
    output_type: Literal["pil", "pt", "np", "latent"] = argument(
        "pil", help="What a call returns: pictures, a tensor, an array, or the latents.", kind="text",
        choices=OUTPUT_TYPES, records=("settings",),
    )  # fmt: skip
    save_latents: str | Path | None = argument(
        None, help=".safetensors, written before the VAE is asked; see pipe.decode.", kind="path", records=()
    )
    save_steps: str | Path | None = argument(
        None, help=".safetensors: steps are kept there on the way; see `resume_from`.", kind="path",
        records=(),
    )  # fmt: skip
    save_every: int | None = argument(
        None, help="Steps between two saves; None: after each minute of work.", kind="whole", unit="steps",
        records=(),
    )  # fmt: skip
    resume_from: str | Path | None = argument(
        None, help="What `save_steps` wrote: the same call goes on from there.", kind="path", records=()
    )
    callback_on_step_end: Callable[..., Mapping[str, Tensor] | None] | None = argument(
        None, help="Called as (pipe, step, timestep, tensors) after each step.", kind="object"
    )
    step_cache: StepCache | None = argument(
        None, help="An object that may answer instead of the blocks.", kind="object", records=("settings",)
    )
    strict: bool = argument(
        False, help="Refuse sizes that do not fit the model instead of taking the next that do.",
        kind="switch", group=VIDEO, flags=("--strict",), records=("settings",), refined="decided",
    )  # fmt: skip
    cache_text: str | Path | None = argument(
        None,
        help="Folder of encoded prompts: each is encoded once; later runs leave the text encoder out.",
        kind="path", group=VIDEO, records=(),
    )  # fmt: skip
    progress_bar_cmd: ProgressBar = argument(
        tqdm, help="Wraps the timesteps.", kind="object", records=("settings",)
    )
    progress_bar_st: object = argument(
        None, help="Accepted because v1 had it.", kind="object", records=("settings",)
    )


@cache
def call_arguments() -> Mapping[str, Argument]:
    """Every argument of ``pipe()``, prompts first. Read only."""
    return arguments_of(readers_of_calls())


def readers_of_calls() -> list[type]:
    """The dataclasses that declare them."""
    kinds = [TextInputs, CallOptions, *(conditioner.Inputs for conditioner in CONDITIONERS.values())]
    return list(dict.fromkeys(kinds))

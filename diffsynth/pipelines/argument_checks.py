"""Numbers and types of a call that no model could use, told before anything runs.

Importing this costs no torch: the command asks it before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING

from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
    from diffsynth.conditioning.text import TextInputs
    from diffsynth.pipelines.components import PipelineComponents

MAX_SEED = 2**64 - 1
MAX_SCALE = 100.0
# name -> smallest, largest, what is usual. NaN, infinity and other types are refused with these words.
NUMBERS: Mapping[str, tuple[float, float, str]] = {
    "num_inference_steps": (1, 10_000, "50 is usual"),
    "num_videos_per_prompt": (1, 1000, "1 is usual"),
    "cfg_scale": (-MAX_SCALE, MAX_SCALE, "1 (no guidance) to 10 are usual"),
    "cfg_scale_low_noise": (-MAX_SCALE, MAX_SCALE, "1 (no guidance) to 10 are usual"),
    "sigma_shift": (1e-3, 1000, "1 is even, Wan uses 3 to 12"),
    "denoising_strength": (1e-3, 1, "0.7 keeps the layout of input_video, 1 ignores it"),
    "switch_DiT_boundary": (0, 1, "0.875 for T2V-A14B"),
}
WHOLE_NUMBERS = ("num_inference_steps", "num_videos_per_prompt")


def check_numbers(given: Mapping[str, object]) -> None:
    """NaN, texts and numbers that no model could mean, of every argument that is a number."""
    for name, (low, high, usual) in NUMBERS.items():
        value = given.get(name)
        is_whole = name in WHOLE_NUMBERS
        if value is None:
            continue
        kind = Integral if is_whole else Real
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # type: ignore[operator]  # NaN is in no range
            what = "a whole number" if is_whole else "a number"
            raise ArgumentError(f"{name} is {value}; give {what} from {low:g} to {high:g}, {usual}.")


def check_seed(seed: object, num_videos: int) -> None:
    """Seeds of torch have 64 bits, and sample i of a batch has the seed + i; -1 draws one."""
    if seed is None:
        return
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise ArgumentError(f"seed is {seed!r}; give a whole number, or None to draw one.")
    if not -1 <= int(seed) <= MAX_SEED - (num_videos - 1):
        raise ArgumentError(f"seed is {seed}; give 0 to {MAX_SEED - (num_videos - 1)}, or -1 to draw one.")


def check_types(given: Mapping[str, object]) -> None:
    """Functions and tensors."""
    from torch import Tensor

    for name in ("callback_on_step_end", "progress_bar_cmd"):
        if (value := given.get(name)) is not None and not callable(value):
            raise ArgumentError(f"{name} is {value!r}; give a function.")
    latents = given.get("latents")
    if latents is not None and not isinstance(latents, Tensor):
        raise ArgumentError(f"latents is a {type(latents).__name__}; give a torch.Tensor.")


def check_embeds(text: TextInputs, parts: PipelineComponents) -> None:
    """Features of texts: real numbers, as wide as the DiT reads."""
    from torch import Tensor

    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = getattr(text, name)
        if embeds is None:
            continue
        if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
            kind = str(embeds.dtype) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ArgumentError(f"{name} is a {kind}; give a torch.Tensor of real numbers.")
        width = None if parts.high is None else parts.high.dit.config.text_dim
        if embeds.ndim == 3 and width not in (None, embeds.shape[2]):
            raise ArgumentError(
                f"{name}: its features are {embeds.shape[2]} wide; this DiT reads {width}. Give those of its "
                "own text encoder."
            )

"""Settings that belong together: what a step-distilled model or LoRA was made for, under one name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from diffsynth.checkpoints.hints import Role
from diffsynth.errors import ArgumentError

logger = logging.getLogger("diffsynth")

REPLACED_BY_SIGMAS = ("num_inference_steps", "sigma_shift")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One row. Noise levels follow from steps and shift."""

    title: str
    source: str  # of every number
    num_inference_steps: int
    sigma_shift: float
    cfg_scale: float
    sampler: str
    cfg_scale_low_noise: float | None = None  # None: that of the high-noise expert
    switch_DiT_boundary: float | None = None  # None: the model's own
    num_high_steps: int | None = None  # of two experts; what steps, shift and boundary come to
    lora_alpha: Mapping[Role, float] | None = None  # strengths of its pair of LoRAs, for `load_lora`

    @property
    def values(self) -> dict[str, object]:
        """Arguments of ``pipe()``."""
        names = ("num_inference_steps", "sigma_shift", "cfg_scale", "sampler", "switch_DiT_boundary")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        low = self.cfg_scale if self.cfg_scale_low_noise is None else self.cfg_scale_low_noise
        return {**found, "cfg_scale_low_noise": low}


PRESETS: dict[str, Preset] = {
    "lightx2v-4step": Preset(
        title="LightX2V step distillation: Wan2.1 and both experts of A14B, LoRA strength 1",
        # Its denoising_step_list [1000, 750, 500, 250] is before the shift: sigmas 1, .9375, .8333, .625.
        # A14B switches after the second step, which its boundaries 0.875 (T2V) and 0.900 (I2V) both give.
        source="LightX2V examples/BeginnerGuide/EN/Wan21-14B.md",
        num_inference_steps=4,
        sigma_shift=5.0,
        cfg_scale=1.0,
        sampler="euler",
    ),
    "wan2.2-lightning-4step": Preset(
        title="Wan2.2-Lightning: a pair of 4-step LoRAs for T2V-A14B or I2V-A14B, both at strength 1",
        # As in ComfyUI: steps 1 and 2 of the high-noise expert, 3 and 4 of the low-noise one, simple grid.
        source="ModelTC/Wan2.2-Lightning",
        num_inference_steps=4,
        sigma_shift=5.0,
        cfg_scale=1.0,
        sampler="euler",
        switch_DiT_boundary=0.875,
        num_high_steps=2,
        lora_alpha={"high": 1.0, "low": 1.0},
    ),
}


def preset_values(given: Mapping[str, object]) -> dict[str, object]:
    """The arguments that ``given["preset"]`` sets and the caller does not; nothing without a preset.

    Each argument that the caller gives in place of the preset's is told in the log.

    Raises:
        ArgumentError: for an unknown preset; lists those there are.
    """
    name = given.get("preset")
    if name is None:
        return {}
    if name not in PRESETS:
        raise ArgumentError(f"preset is {name!r}; known: {', '.join(PRESETS)}.")
    values = PRESETS[str(name)].values
    replaced = REPLACED_BY_SIGMAS if given.get("sigmas") is not None else ()
    kept = {}
    for argument, value in values.items():
        own = given.get(argument)
        if argument == "cfg_scale_low_noise" and own is None and given.get("cfg_scale") is not None:
            continue  # the caller's scale is meant for both experts
        if argument in replaced:
            logger.info("preset %s: sigmas= replaces its %s=%s.", name, argument, value)
        elif own is None:
            kept[argument] = value
        elif own != value:
            logger.info("preset %s: %s=%s as given, instead of %s.", name, argument, own, value)
    return kept

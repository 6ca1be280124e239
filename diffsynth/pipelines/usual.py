"""What arguments of a call are when nobody gives them; known without torch."""

from __future__ import annotations

from collections.abc import Mapping

V1_DEFAULTS: dict[str, object] = {
    "height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "cfg_scale": 5.0,
    "sigma_shift": 5.0, "sampler": "euler",
}  # fmt: skip
# Models that v1 did not know: official values (Wan2.2 wan/configs). Key: family and whether there are two
# experts.
OFFICIAL_DEFAULTS: dict[tuple[str, bool], dict[str, object]] = {
    ("t2v", True): {"height": 720, "width": 1280, "num_inference_steps": 40, "cfg_scale": 4.0,
                    "cfg_scale_low_noise": 3.0, "sigma_shift": 12.0, "sampler": "unipc"},
    ("i2v", True): {"height": 720, "width": 1280, "num_inference_steps": 40, "cfg_scale": 3.5,
                    "sigma_shift": 5.0, "sampler": "unipc"},
    ("ti2v", False): {"height": 704, "width": 1280, "num_frames": 121, "num_inference_steps": 50,
                      "cfg_scale": 5.0, "sigma_shift": 5.0, "sampler": "unipc", "fps": 24},
}  # fmt: skip


def usual_values_of(
    family: str, *, has_two_experts: bool, is_22: bool, told: Mapping[str, object]
) -> dict[str, object]:
    """The checkpoint's own values, the official, v1's, in this order.

    Args:
        family: of the DiT, such as "t2v".
        has_two_experts: of a high- and a low-noise expert.
        is_22: whether its latents are those of the Wan2.2 VAE: TI2V-5B and what was made of it.
        told: by the checkpoint.
    """
    key = ("ti2v", False) if is_22 else (family, has_two_experts)
    official = dict(OFFICIAL_DEFAULTS.get(key, {}))
    if "cfg_scale" in told:
        official.pop("cfg_scale_low_noise", None)  # the checkpoint's scale is meant for both experts
    return {**V1_DEFAULTS, **official, **told}

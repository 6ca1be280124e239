"""Arguments of ``pipe()`` that scripts of DiffSynth-Studio carry and that nothing here reads.

A value that asks for nothing (the default there) passes in silence. Any other value stops the call with the
name of what would read it: it is not part of this version, and to leave it out would make another video.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from diffsynth.errors import UnusedInputError

logger = logging.getLogger("diffsynth")


@dataclass(frozen=True, slots=True)
class Unread:
    """One argument: the values that ask for nothing, and what would read the others."""

    harmless: tuple[object, ...]
    reader: str
    any_text: bool = False  # a companion of another argument, which asks for nothing alone: every text passes
    any_number: bool = False

    def asks_for_nothing(self, value: object) -> bool:
        """Whether the video is the same without it."""
        if isinstance(value, str) and self.any_text:
            return True
        if isinstance(value, (int, float)) and self.any_number:
            return True
        return any(
            value is one or (isinstance(value, (int, float, str, list, tuple)) and value == one)
            for one in self.harmless
        )


_STEP_CACHE = "a step cache by name, which this version lacks; step_cache= takes an object"
_WINDOWS = "sliding windows over a long video, which this version does not make"
_SPEECH = "Wan2.2-S2V-14B (speech to video), which this version does not run"
_ANIMATE = "Wan2.2-Animate-14B, which this version does not run"
_ANIMATE2 = "Wan-Animate-2, which this version does not run"
_VAP = "Video-As-Prompt, which this package does not run"
_LONGCAT = "LongCat-Video, which this package does not run"
_DANCER = "Wan-Dancer, which this package does not run"

UNREAD: dict[str, Unread] = {
    "tea_cache_l1_thresh": Unread((None, 0), _STEP_CACHE),  # at 0 every step is computed
    "tea_cache_model_id": Unread((None, ""), _STEP_CACHE, any_text=True),
    "sliding_window_size": Unread((None,), _WINDOWS),
    "sliding_window_stride": Unread((None,), _WINDOWS),
    "input_audio": Unread((None,), _SPEECH),
    "audio_embeds": Unread((None,), _SPEECH),
    "audio_sample_rate": Unread((None,), _SPEECH, any_number=True),
    "s2v_pose_video": Unread((None,), _SPEECH),
    "s2v_pose_latents": Unread((None,), _SPEECH),
    "motion_video": Unread((None, []), _SPEECH),
    "animate_pose_video": Unread((None,), _ANIMATE),
    "animate_face_video": Unread((None,), _ANIMATE),
    "animate_inpaint_video": Unread((None,), _ANIMATE),
    "animate_mask_video": Unread((None,), _ANIMATE),
    "animate2_prompt_ref": Unread((None, "", " "), _ANIMATE2),
    "animate2_reference_image": Unread((None,), _ANIMATE2),
    "animate2_reference_video": Unread((None,), _ANIMATE2),
    "animate2_refert_images": Unread((None,), _ANIMATE2),
    "animate2_offload_kv": Unread((None, False), _ANIMATE2),
    "animate2_log_scale": Unread((None, 0), _ANIMATE2),
    "vap_video": Unread((None,), _VAP),
    "vap_prompt": Unread((None, "", " "), _VAP),
    "negative_vap_prompt": Unread((None, "", " "), _VAP),
    "longcat_video": Unread((None,), _LONGCAT),
    "wantodance_music_path": Unread((None,), _DANCER),
    "wantodance_reference_image": Unread((None,), _DANCER),
    "wantodance_fps": Unread((None,), _DANCER, any_number=True),
    "wantodance_keyframes": Unread((None,), _DANCER),
    "wantodance_keyframes_mask": Unread((None,), _DANCER),
    "framewise_decoding": Unread((None, False), _DANCER),
}
ADVERTISED = {"tea_cache_l1_thresh": None, "tea_cache_model_id": ""}  # of v1: in the signature, with defaults
QUANTIZED = "quantized"  # 2.x's word for frames of 8 bits


def without_foreign(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments without those that ask for nothing.

    Raises:
        UnusedInputError: for one that asks for something which this version lacks.
    """
    kept = {}
    for name, value in arguments.items():
        if name == "cfg_merge":
            if value:
                logger.info("cfg_merge: each block runs for both sides of the guidance anyway.")
        elif name == "output_type" and value == QUANTIZED:
            continue  # PIL frames, as by default
        elif name not in UNREAD:
            kept[name] = value
        elif not UNREAD[name].asks_for_nothing(value):
            raise UnusedInputError(
                f"{name} was given, but no loaded model reads it: it needs {UNREAD[name].reader}."
            )
    return kept

"""Networks, what recognises and holds them, and their LoRAs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth.lazy import lazy_names

if TYPE_CHECKING:
    from diffsynth.checkpoints.state_dict import load_state_dict
    from diffsynth.models.model_manager import ModelManager
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "ModelManager": "diffsynth.models.model_manager",
            "load_state_dict": "diffsynth.checkpoints.state_dict",
        },
    )

__all__ = ["ModelManager", "load_state_dict"]

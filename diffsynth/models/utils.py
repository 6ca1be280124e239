"""Where DiffSynth-Studio 1.x had `load_state_dict`."""

from diffsynth.checkpoints.state_dict import load_state_dict

__all__ = ["load_state_dict"]

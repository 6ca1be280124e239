"""All kinds of input."""

from __future__ import annotations

from diffsynth.conditioning.conditioner import Conditioner
from diffsynth.conditioning.text import TextConditioner
from diffsynth.conditioning.video import VideoConditioner

CONDITIONERS: dict[str, Conditioner] = {"text": TextConditioner(), "video": VideoConditioner()}

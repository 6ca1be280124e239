"""All kinds of input."""

from __future__ import annotations

from diffsynth.conditioning.camera import CameraConditioner
from diffsynth.conditioning.conditioner import Conditioner
from diffsynth.conditioning.control import ControlConditioner
from diffsynth.conditioning.image import ImageConditioner, ImageTokensConditioner
from diffsynth.conditioning.reference import ReferenceConditioner
from diffsynth.conditioning.speed import SpeedConditioner
from diffsynth.conditioning.text import TextConditioner
from diffsynth.conditioning.vace import VaceConditioner
from diffsynth.conditioning.video import VideoConditioner

CONDITIONERS: dict[str, Conditioner] = {
    "text": TextConditioner(),
    "video": VideoConditioner(),
    "image": ImageConditioner(),
    "image_tokens": ImageTokensConditioner(),
    "control": ControlConditioner(),
    "reference": ReferenceConditioner(),
    "camera": CameraConditioner(),
    "speed": SpeedConditioner(),
    "vace": VaceConditioner(),
}

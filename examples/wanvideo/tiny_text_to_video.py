"""Text to video with the tiny Wan that ships with diffsynth: no download, no GPU, seconds."""

import torch

from diffsynth import WanVideoPipeline, save_video
from diffsynth.tiny import tiny_folder

pipe = WanVideoPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.float32, device="cpu")
video = pipe(prompt="a red circle moves right", seed=0)
save_video(video, "tiny.mp4", fps=8, metadata=pipe.last_settings)

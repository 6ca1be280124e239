"""Slow and fast: one prompt and seed at two speeds, with Wan2.1-T2V-1.3B and its speed adapter. Set the paths
and run; with --tiny, toy networks on the CPU.
"""

import sys

import torch

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/Wan-AI/Wan2.1-T2V-1.3B"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
SPEED = "models/DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1/model.safetensors"

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("speed") if TINY else [DIT, TEXT_ENCODER, VAE, SPEED])
pipe = WanVideoPipeline.from_model_manager(
    manager, torch_dtype=torch.bfloat16, device="cpu" if TINY else "cuda"
)

for name, motion_bucket_id in {"slow": 0, "fast": 100}.items():
    video = pipe(
        prompt="A documentary shot of a lively puppy running across green grass.",
        negative_prompt="blurry, static, overexposed, subtitles, low quality",
        motion_bucket_id=motion_bucket_id,
        seed=1,
        tiled=True,
    )
    save_video(video, f"video_{name}.mp4", fps=15, quality=5)

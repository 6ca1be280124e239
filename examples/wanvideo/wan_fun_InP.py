"""First, or first and last frame with Wan2.1-Fun-1.3B-InP. Set the paths and run; with --tiny, toy networks
on the CPU.
"""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.1-Fun-1.3B-InP"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
IMAGE_ENCODER = f"{FOLDER}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
FIRST, LAST = "first.jpg", "last.jpg"

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("i2v") if TINY else [DIT, IMAGE_ENCODER, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(
    manager, torch_dtype=torch.bfloat16, device="cpu" if TINY else "cuda"
)

video = pipe(
    prompt="A documentary shot of a lively puppy running across green grass.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    input_image=Image.new("RGB", (640, 360), "teal") if TINY else Image.open(FIRST),
    end_image=Image.new("RGB", (640, 360), "gold") if TINY else Image.open(LAST),  # may be left out
    seed=0,
    tiled=True,
)
save_video(video, "video.mp4", fps=15, quality=5)

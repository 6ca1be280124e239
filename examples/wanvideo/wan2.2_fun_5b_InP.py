"""First and last frame with Wan2.2-Fun-5B-InP. Set the folder and run; --tiny: toy networks."""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.2-Fun-5B-InP"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.2_VAE.pth"
first = Image.new("RGB", (64, 32), "teal") if TINY else Image.open("first.jpg")
last = Image.new("RGB", (64, 32), "gold") if TINY else Image.open("last.jpg")

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("i2v-5b") if TINY else [DIT, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")

# 121 frames of 1280x704, without being told
video = pipe(
    prompt="A documentary shot of a lively puppy running across green grass.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    input_image=first,
    end_image=last,  # may be left out
    seed=0,
)
save_video(video, "video.mp4", fps=24, quality=5)

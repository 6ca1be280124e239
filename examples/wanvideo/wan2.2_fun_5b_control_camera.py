"""A moving camera, with Wan2.2-Fun-5B-Control-Camera. Set the folder and run; --tiny: toy networks."""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.2-Fun-5B-Control-Camera"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.2_VAE.pth"
picture = Image.new("RGB", (64, 32), "skyblue") if TINY else Image.open("first_frame.png")

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("camera-5b") if TINY else [DIT, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")

# 121 frames of 1280x704, without being told
video = pipe(
    prompt="A small boat sails over a calm sea under a clear sky.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    input_image=picture,
    camera_control_direction="Left",
    camera_control_speed=0.01,
    seed=0,
)
save_video(video, "video.mp4", fps=24, quality=5)

"""A moving camera, with Wan2.1-Fun-V1.1-1.3B-Control-Camera. Set the paths and run; with --tiny, toy networks
on the CPU.
"""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera"
MODELS = [
    f"{FOLDER}/diffusion_pytorch_model.safetensors",
    f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth",
    f"{FOLDER}/Wan2.1_VAE.pth",
    f"{FOLDER}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
]

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("camera") if TINY else MODELS)
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")

first_frame = Image.new("RGB", (832, 480), "skyblue") if TINY else Image.open("first_frame.png")
for direction in ("Left", "Up", "In"):
    video = pipe(
        prompt="A small boat sails over a calm sea under a clear sky.",
        negative_prompt="blurry, static, overexposed, subtitles, low quality",
        input_image=first_frame,
        camera_control_direction=direction,
        camera_control_speed=0.01,
        seed=0,
        tiled=True,
    )
    save_video(video, f"video_{direction}.mp4", fps=15, quality=5)

"""Text and image to video with Wan2.2-TI2V-5B. Set the paths and run; --tiny: toy networks on the CPU."""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/Wan-AI/Wan2.2-TI2V-5B"
DIT = [f"{FOLDER}/diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in range(1, 4)]
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.2_VAE.pth"
PICTURE = "input.jpg"  # the first frame
AREA = 64 * 64 if TINY else 704 * 1280  # pixels; height and width follow the picture's proportions

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("ti2v") if TINY else [DIT, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(
    manager, torch_dtype=torch.bfloat16, device="cpu" if TINY else "cuda"
)

prompt = "A small boat braves the waves; the sea is rough, white foam beats against the wooden hull."
negative_prompt = "blurry, static, overexposed, subtitles, low quality, deformed hands"

# 121 frames of 1280x704 in 50 steps, without being told
video = pipe(prompt=prompt, negative_prompt=negative_prompt, seed=0)
save_video(video, "text_to_video.mp4", fps=24, quality=5)

picture = Image.new("RGB", (640, 360), "teal") if TINY else Image.open(PICTURE)
video = pipe(prompt=prompt, negative_prompt=negative_prompt, input_image=picture, max_area=AREA, seed=0)
save_video(video, "image_to_video.mp4", fps=24, quality=5)

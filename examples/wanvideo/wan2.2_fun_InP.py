"""First and last frame with the two experts of Wan2.2-Fun-A14B-InP. Set the folder and run; with --tiny,
toy networks on the CPU.
"""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.2-Fun-A14B-InP"
HIGH, LOW = f"{FOLDER}/high_noise_model", f"{FOLDER}/low_noise_model"  # their names tell the roles
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
first = Image.new("RGB", (48, 32), "teal") if TINY else Image.open("first.jpg")
last = Image.new("RGB", (48, 32), "gold") if TINY else Image.open("last.jpg")

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("i2v-a14b", num_experts=2) if TINY else [HIGH, LOW, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")
pipe.enable_vram_management(num_persistent_param_in_dit=0)  # one expert at a time, block by block

video = pipe(
    prompt="A documentary shot of a lively puppy running across green grass.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    input_image=first,
    end_image=last,  # may be left out
    seed=0,
)
save_video(video, "video.mp4", fps=16, quality=5)

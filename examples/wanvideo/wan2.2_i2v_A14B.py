"""Image to video with the two experts of Wan2.2-I2V-A14B. Set the folder and run; with --tiny, toy
networks on the CPU.
"""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/Wan-AI/Wan2.2-I2V-A14B"
HIGH, LOW = f"{FOLDER}/high_noise_model", f"{FOLDER}/low_noise_model"  # their names tell the roles
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
picture = Image.new("RGB", (48, 32), "teal") if TINY else Image.open("input.jpg")

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("i2v-a14b", num_experts=2) if TINY else [HIGH, LOW, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")
pipe.enable_vram_management(num_persistent_param_in_dit=0)  # one expert at a time, block by block

video = pipe(
    prompt="A white cat in sunglasses sits on a surfboard; waves roll behind it under a blue sky.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality, deformed hands",
    input_image=picture,
    max_area=None if TINY else 480 * 832,  # height and width follow from the picture
    seed=0,
)
save_video(video, "video.mp4", fps=16, quality=5)

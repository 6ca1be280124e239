"""A moving camera, with the two experts of Wan2.2-Fun-A14B-Control-Camera. Set the folder and run; with
--tiny, toy networks on the CPU.
"""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.2-Fun-A14B-Control-Camera"
HIGH, LOW = f"{FOLDER}/high_noise_model", f"{FOLDER}/low_noise_model"  # their names tell the roles
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
picture = Image.new("RGB", (48, 32), "skyblue") if TINY else Image.open("first_frame.png")

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("camera-a14b", num_experts=2) if TINY else [HIGH, LOW, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")
pipe.enable_vram_management(num_persistent_param_in_dit=0)  # one expert at a time, block by block

video = pipe(
    prompt="A small boat sails over a calm sea under a clear sky.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    input_image=picture,
    camera_control_direction="Left",
    camera_control_speed=0.01,
    seed=0,
)
save_video(video, "video.mp4", fps=16, quality=5)

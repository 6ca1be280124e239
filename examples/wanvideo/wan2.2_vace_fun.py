"""A control video and a reference picture, with the two experts of Wan2.2-VACE-Fun-A14B. Set the folder
and run; with --tiny, toy networks on the CPU.
"""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, VideoData, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.2-VACE-Fun-A14B"
HIGH, LOW = f"{FOLDER}/high_noise_model", f"{FOLDER}/low_noise_model"  # their names tell the roles
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
control = torch.rand(5, 3, 32, 48) if TINY else VideoData("depth.mp4", height=480, width=832)
reference = Image.new("RGB", (40, 40), "orange") if TINY else Image.open("cat.png")

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("vace", num_experts=2) if TINY else [HIGH, LOW, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")
pipe.enable_vram_management(num_persistent_param_in_dit=0)  # one expert at a time, block by block

video = pipe(
    prompt="Two fluffy cats in boxing gloves fight on a lit stage.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    vace_video=control,
    vace_reference_image=reference,  # either may be left out
    seed=1,
)
save_video(video, "video.mp4", fps=16, quality=5)

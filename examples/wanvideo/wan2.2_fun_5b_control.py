"""A video that follows another, with Wan2.2-Fun-5B-Control. Set the folder and run; --tiny: toy networks."""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, VideoData, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.2-Fun-5B-Control"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.2_VAE.pth"
control = torch.rand(5, 3, 32, 64) if TINY else VideoData("control.mp4")  # edges, poses or depth
reference = Image.new("RGB", (64, 32), "purple") if TINY else Image.open("reference.png")

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("control-5b") if TINY else [DIT, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, device="cpu" if TINY else "cuda")

# 121 frames of 1280x704, without being told
video = pipe(
    prompt="A young woman in a flowing purple dress dances by the sea in the last light of the day.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    control_video=control,
    reference_image=reference,  # may be left out, as may input_image
    fit="trim",  # the first frames of a longer video
    seed=1,
)
save_video(video, "video.mp4", fps=24, quality=5)

"""A video that follows the edges, poses or depth of another, with Wan2.1-Fun-1.3B-Control. Set the paths and
run; with --tiny, toy networks on the CPU.
"""

import sys

import torch

from diffsynth import ModelManager, VideoData, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/PAI/Wan2.1-Fun-1.3B-Control"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
IMAGE_ENCODER = f"{FOLDER}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
CONTROL = "control.mp4"  # made by `diffsynth preprocess --task canny`, for example
HEIGHT, WIDTH, NUM_FRAMES = (32, 48, 5) if TINY else (832, 576, 49)

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("control") if TINY else [DIT, IMAGE_ENCODER, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(
    manager, torch_dtype=torch.bfloat16, device="cpu" if TINY else "cuda"
)

video = pipe(
    prompt="A young woman in a flowing purple dress dances by the sea in the last light of the day.",
    negative_prompt="blurry, static, overexposed, subtitles, low quality",
    control_video=torch.rand(5, 3, 32, 48) if TINY else VideoData(CONTROL),
    fit="trim",  # the first frames of a longer video
    seed=1,
    tiled=True,
    height=HEIGHT,
    width=WIDTH,
    num_frames=NUM_FRAMES,
)
save_video(video, "video.mp4", fps=15, quality=5)

"""A control video, a reference picture, and both, with Wan2.1-VACE-1.3B (more in docs/vace.md). Set the paths
and run; with --tiny, toy networks on the CPU.
"""

import sys

import torch
from PIL import Image

from diffsynth import ModelManager, VideoData, WanVideoPipeline, save_video
from diffsynth.models.toy import toy_files

TINY = "--tiny" in sys.argv
FOLDER = "models/Wan-AI/Wan2.1-VACE-1.3B"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
CONTROL = "depth.mp4"  # made by `diffsynth preprocess --task depth`, for example
REFERENCE = "cat.png"

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models(toy_files("vace") if TINY else [DIT, TEXT_ENCODER, VAE])
device = "cpu" if TINY else "cuda"
pipe = WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.bfloat16, device=device)
control = torch.rand(5, 3, 32, 48) if TINY else VideoData(CONTROL, height=480, width=832)
reference = Image.new("RGB", (40, 40), "orange") if TINY else Image.open(REFERENCE)

calls = {"control": (control, None), "reference": (None, reference), "both": (control, reference)}
for name, (source, picture) in calls.items():
    video = pipe(
        prompt="Two fluffy cats in boxing gloves fight on a lit stage.",
        negative_prompt="blurry, static, overexposed, subtitles, low quality",
        vace_video=source,
        vace_reference_image=picture,
        seed=1,
        tiled=True,
    )
    save_video(video, f"video_{name}.mp4", fps=15, quality=5)

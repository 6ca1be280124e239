"""Video to video with Wan2.1-T2V-1.3B: keeps the layout of a video and repaints it. Set the paths and run."""

import torch

from diffsynth import ModelManager, VideoData, WanVideoPipeline, save_video

FOLDER = "models/Wan-AI/Wan2.1-T2V-1.3B"
DIT = f"{FOLDER}/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = f"{FOLDER}/models_t5_umt5-xxl-enc-bf16.pth"
VAE = f"{FOLDER}/Wan2.1_VAE.pth"
SOURCE = "video.mp4"  # 81 frames or more
# the default of the official repository
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
manager.load_models([DIT, TEXT_ENCODER, VAE])
pipe = WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.bfloat16, device="cuda")

video = pipe(
    prompt="A documentary shot of a lively puppy wearing black sunglasses, running across green grass.",
    negative_prompt=NEGATIVE_PROMPT,
    input_video=VideoData(SOURCE, height=480, width=832),
    denoising_strength=0.7,
    num_inference_steps=50,
    seed=1,
    tiled=True,
)
save_video(video, "edited.mp4", fps=15, quality=5)

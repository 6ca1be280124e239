"""What a type checker and an editor know of ``pipe(...)``; nothing runs it.

Generated from the declarations of the arguments: python -m diffsynth.pipelines.call_stub
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from diffsynth.conditioning.camera import USUAL_ORIGIN
from diffsynth.conditioning.clips import Fit
from diffsynth.denoising.loop import ProgressBar
from diffsynth.denoising.step_cache import StepCache
from diffsynth.video import Frame, Resize
from diffsynth.video.pixels import Frames


def call(  # noqa: PLR0913
    self: object,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] = "",
    *,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    num_videos_per_prompt: int = 1,
    cache_text: str | Path | None = None,
    cfg_scale: float | None = None,
    cfg_scale_low_noise: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    preset: str | None = None,
    seed: int | None = None,
    rand_device: str = "cpu",
    num_inference_steps: int | None = None,
    sampler: str | None = None,
    sigma_shift: float | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    latents: Tensor | None = None,
    switch_DiT_boundary: float | None = None,
    single_expert: bool = False,
    tiled: bool | None = None,
    tile_size: tuple[int, int] | None = None,
    tile_stride: tuple[int, int] | None = None,
    output_type: Literal["pil", "pt", "np", "latent"] = "pil",
    save_latents: str | Path | None = None,
    save_steps: str | Path | None = None,
    save_every: int | None = None,
    resume_from: str | Path | None = None,
    callback_on_step_end: Callable[..., Mapping[str, Tensor] | None] | None = None,
    step_cache: StepCache | None = None,
    strict: bool = False,
    progress_bar_cmd: ProgressBar = tqdm,
    progress_bar_st: object = None,
    input_video: Frames | None = None,
    fit: Fit | None = None,
    denoising_strength: float = 1.0,
    input_image: Frame | None = None,
    end_image: Frame | None = None,
    reference_image: Frame | None = None,
    resize: Resize = "cover",
    max_area: int | None = None,
    control_video: Frames | None = None,
    vace_video: Frames | None = None,
    vace_video_mask: Frames | None = None,
    camera_control_direction: str | None = None,
    camera_control_speed: float = 0.018518518518518517,
    camera_control_origin: Sequence[float] = USUAL_ORIGIN,
    camera_control_poses: Sequence[Sequence[float]] | None = None,
    motion_bucket_id: float | None = None,
    vace_reference_image: Frame | Sequence[Frame] | None = None,
    vace_scale: float | Sequence[float] = 1.0,
    tea_cache_l1_thresh: object = None,
    tea_cache_model_id: object = "",
) -> Any:
    """Make videos; see `WanVideoPipeline.__call__`.

    Args:
        self: the pipeline.
        prompt: What to show: one text, or a list for a batch.
        negative_prompt: What to keep away from.
        prompt_embeds: (B, tokens, text_dim of the DiT), in place of `prompt`.
        negative_prompt_embeds: (B or 1, tokens, text_dim), in place of `negative_prompt`.
        num_videos_per_prompt: How many, numbered NAME-1, NAME-2 ...; each with a seed one higher.
        cache_text: Folder of encoded prompts: each is encoded once; later runs leave the text encoder out.
        cfg_scale: How strongly the prompt pulls; Wan2.1: 5. 1 is no guidance, in half the time.
        cfg_scale_low_noise: The same for the low-noise expert of a model that has two.
        height: Pixels, a multiple of 16; Wan2.1: 480.
        width: Pixels, a multiple of 16; Wan2.1: 832.
        num_frames: 4 k + 1; Wan2.1: 81. 1 makes a picture.
        preset: Settings of a step-distilled model or LoRA: lightx2v-4step. Flags given beside it win.
        seed: One number, one video; drawn if not given.
        rand_device: Where noise is drawn; cpu gives the same video on every machine.
        num_inference_steps: Calls of the model; Wan2.1: 50.
        sampler: How noise becomes video.
        sigma_shift: How far noise levels lean to the noisy end: 1 is even, 3 to 12 are usual.
        sigmas: Noise levels, falling, without the final 0; replaces steps and shift.
        timesteps: What the network is told at each of `sigmas`.
        latents: Initial noise (B, C, F, H, W) float32; replaces the seed.
        switch_DiT_boundary: Noise level, 0 to 1, where the low-noise expert takes over.
        single_expert: Let one expert of a pair take every step, where the other is not in --model.
        tiled: Code pictures in tiles, which saves memory; default: where the whole does not fit.
        tile_size: Height and width, 8 pixels each; 30 52.
        tile_stride: From one tile to the next; 15 26.
        output_type: What a call returns: pictures, a tensor, an array, or the latents.
        save_latents: .safetensors, written before the VAE is asked; see pipe.decode.
        save_steps: .safetensors: steps are kept there on the way; see `resume_from`.
        save_every: Steps between two saves; None: after each minute of work.
        resume_from: What `save_steps` wrote: the same call goes on from there.
        callback_on_step_end: Called as (pipe, step, timestep, tensors) after each step.
        step_cache: An object that may answer instead of the blocks.
        strict: Refuse sizes that do not fit the model instead of taking the next that do.
        progress_bar_cmd: Wraps the timesteps.
        progress_bar_st: Accepted because v1 had it.
        input_video: A video, or a folder of pictures.
        fit: Of a video that is not `num_frames` long: trim a longer, hold a shorter one's last frame.
        denoising_strength: Share of noise laid over `input_video`: 0.7 keeps the layout, 1 ignores it.
        input_image: The first frame, of an image-to-video model.
        end_image: The last frame, of an FLF2V or InP model.
        reference_image: What the video shows, of a Fun V1.1 Control model.
        resize: How pictures are brought to size: cover crops, stretch distorts, contain sets bars.
        max_area: Pixels: height and width follow `input_image`'s proportions; 480 * 832 = 399360.
        control_video: Edges, poses or depth to follow, of a Fun Control model: a video, or a folder of
            pictures.
        vace_video: What is known, of a VACE model, grey where something shall be made: a video, or a folder.
        vace_video_mask: Of `vace_video`: white is made anew, black is kept; a video, or a folder of pictures.
        camera_control_direction: Of a Fun Control-Camera model: Left, Right, Up, Down, In, Out, or joined,
            such as LeftUp.
        camera_control_speed: How far the camera goes from one frame to the next; 1/54 = 0.0185.
        camera_control_origin: Pose of the first frame, 19 numbers.
        camera_control_poses: One pose per frame, in place of `camera_control_direction`.
        motion_bucket_id: Of the speed-control model: 0 (slow) to 100 (fast).
        vace_reference_image: What or who shall appear, of a VACE model; several times for several pictures.
        vace_scale: How strongly the VACE inputs count: 0 to 2; 1 is usual.
        tea_cache_l1_thresh: Not read; v1 had it.
        tea_cache_model_id: Not read; v1 had it.

    Returns:
        As ``output_type`` asks: a list of PIL frames, or of such lists for a batch; a tensor; an array.
    """
    raise NotImplementedError

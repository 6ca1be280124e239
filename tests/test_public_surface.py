"""What other people's scripts rely on. A change here is a decision, and belongs into the changelog."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

import diffsynth
from diffsynth.cli.app import app
from diffsynth.conditioning.camera import USUAL_ORIGIN
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline

NAMES = [
    "ModelConfig", "ModelManager", "VideoData", "VideoWriter", "WanVideoPipeline",
    "download_customized_models", "download_models", "load_state_dict", "read_metadata", "save_frames",
    "save_image", "save_video",
]  # fmt: skip

# arguments of pipe() and their defaults; None is the model's own
CALL: dict[str, Any] = {
    "camera_control_direction": None, "camera_control_origin": USUAL_ORIGIN, "camera_control_poses": None,
    "camera_control_speed": 1 / 54, "fit": None,
    "callback_on_step_end": None, "cfg_scale": None, "cfg_scale_low_noise": None, "control_video": None,
    "denoising_strength": 1.0, "end_image": None, "height": None, "input_image": None, "input_video": None,
    "latents": None, "max_area": None, "resize": "cover", "motion_bucket_id": None, "negative_prompt": "",
    "negative_prompt_embeds": None,
    "num_frames": None, "num_inference_steps": None, "num_videos_per_prompt": 1, "output_type": "pil",
    "progress_bar_st": None, "prompt": None, "prompt_embeds": None, "rand_device": "cpu",
    "cache_text": None, "save_latents": None, "save_steps": None, "save_every": None,
    "resume_from": None,
    "preset": None, "reference_image": None, "sampler": None, "seed": None, "sigma_shift": None,
    "sigmas": None,
    "single_expert": False,
    "step_cache": None, "strict": False, "switch_DiT_boundary": None, "tea_cache_l1_thresh": None,
    "tea_cache_model_id": "", "tile_size": None, "tile_stride": None, "tiled": None, "timesteps": None,
    "vace_reference_image": None, "vace_scale": 1.0, "vace_video": None, "vace_video_mask": None,
    "width": None,
}  # fmt: skip

FLAGS = {
    "diffsynth": {"--version"},
    "generate": {
        "prompt", "--cfg-scale", "--cfg-scale-low-noise", "--codec", "--crf", "--debug",
        "--denoising-strength", "--device", "--dit", "--download", "--dtype", "--fps", "--height",
        "--control-video", "--fit", "--reference-image", "--camera-control-direction",
        "--camera-control-speed", "--motion-bucket-id",
        "--input-video", "--input-image", "--end-image", "--resize", "--max-area", "--model",
        "--lora",
        "--negative-prompt", "--no-tiled", "--num-frames", "--num-inference-steps", "--num-videos-per-prompt",
        "--out", "--overwrite", "--pix-fmt", "--precision", "--preset", "--quality", "--quiet", "--sampler",
        "--seed", "--sigma-shift", "--single-expert",
        "--steps", "--strict", "--switch-dit-boundary", "--tile-size", "--tile-stride", "--tiled",
        "--tokenizer-path", "--width", "-o", "-q", "--cache-text", "--keep-latents", "--vram", "--ram",
        "--num-persistent", "--attention", "--fp8-compute",
        "--vace-video", "--vace-video-mask", "--vace-reference-image", "--vace-scale", "--preview",
        "--save-every", "--resume",
        # of Wan's own generate.py, and --init_video and --denoising_strength, spelled like them
        "--task", "--prompt", "--size", "--frame_num", "--ckpt_dir", "--save_file", "--base_seed",
        "--sample_solver", "--sample_steps", "--sample_shift", "--sample_guide_scale", "--image",
        "--first_frame", "--last_frame", "--src_video", "--src_mask", "--src_ref_images",
        "--input_video_path", "--offload_model", "--t5_cpu", "--convert_model_dtype", "--init_video",
        "--denoising_strength",
        # of them, known and told to be missing
        "--ulysses_size", "--ring_size", "--t5_fsdp", "--dit_fsdp", "--use_prompt_extend",
        "--prompt_extend_method", "--prompt_extend_model", "--prompt_extend_target_lang",
        "--src_root_path", "--refert_num", "--replace_flag", "--use_relighting_lora", "--num_clip", "--audio",
        "--enable_tts", "--tts_prompt_audio", "--tts_prompt_text", "--tts_text", "--pose_video",
        "--start_from_ref", "--infer_frames",
    },
    "refine": {
        "prompt", "--from", "--size", "--cfg-scale", "--cfg-scale-low-noise", "--codec", "--crf", "--debug",
        "--denoising-strength", "--denoising_strength", "--device", "--dit", "--download", "--dtype", "--fps",
        "--height", "--control-video", "--fit", "--reference-image", "--camera-control-direction",
        "--camera-control-speed", "--motion-bucket-id", "--input-image", "--end-image", "--resize", "--model",
        "--lora", "--negative-prompt", "--no-tiled", "--num-frames", "--num-inference-steps", "--out",
        "--overwrite",
        "--pix-fmt", "--precision", "--preset", "--quality", "--quiet", "--sampler", "--seed",
        "--sigma-shift", "--single-expert",
        "--steps", "--switch-dit-boundary", "--tile-size", "--tile-stride", "--tiled",
        "--tokenizer-path", "--width", "-o", "-q", "--cache-text", "--keep-latents", "--vram", "--ram",
        "--num-persistent", "--attention", "--fp8-compute", "--vace-video", "--vace-video-mask",
        "--vace-reference-image", "--vace-scale", "--save-every",
    },
    "preprocess": {
        "source", "out", "--task", "--boxes", "--model", "--download", "--device", "--fps", "--thresholds",
        "--overwrite",
    },
    "decode": {
        "latents", "--codec", "--crf", "--debug", "--device", "--dtype", "--fps", "--no-tiled", "--out",
        "--overwrite",
        "--pix-fmt", "--quality", "--quiet", "--tile-size", "--tile-stride", "--tiled", "--vae", "-o", "-q",
    },
    "plan": {
        "paths", "--height", "--width", "--num-frames", "--vram", "--ram", "--dtype", "--num-persistent",
        "--no-cfg", "--copy-gbs", "--ring-gbs", "--tflops", "--json",
    },
    "inspect": {"paths", "--json"},
    "schema": {"--json"},
    "lora": set(),
    "dataset": set(),
    "train": set(),
    "doctor": {"--json"},
}  # fmt: skip


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_public_names() -> None:
    assert sorted(diffsynth.__all__) == NAMES
    assert all(getattr(diffsynth, name) is not None for name in NAMES)
    assert set(NAMES) <= set(dir(diffsynth))
    with pytest.raises(AttributeError, match="no attribute 'SDXLPipeline'"):
        _ = diffsynth.SDXLPipeline


def test_signature_of_a_call() -> None:
    signature = inspect.signature(WanVideoPipeline.__call__)
    assert list(signature.parameters)[:3] == ["self", "prompt", "negative_prompt"]
    told = defaults(WanVideoPipeline.__call__)
    assert callable(told.pop("progress_bar_cmd"))
    assert told == CALL
    keyword_only = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert set(keyword_only) == {*CALL, "progress_bar_cmd"} - {"prompt", "negative_prompt"}


def test_signatures_of_loading() -> None:
    assert list(inspect.signature(ModelManager).parameters)[:2] == ["torch_dtype", "device"]
    loading = inspect.signature(ModelManager.load_models).parameters
    assert list(loading) == ["self", "file_path_list", "model_names", "device", "torch_dtype"]
    assert defaults(ModelManager.fetch_model) == {"file_path": None, "require_model_path": False}
    assert defaults(WanVideoPipeline.from_model_manager) == {
        "torch_dtype": None, "device": None, "use_usp": False, "dit": None, "tokenizer_path": None,
        "precision": "official",
    }  # fmt: skip
    pretrained = {
        "path", "device", "dit", "download", "precision", "tokenizer_path", "torch_dtype", "vram_limit",
        # of DiffSynth-Studio 1.1.8 and 2.x
        "model_configs", "tokenizer_config", "audio_processor_config", "redirect_common_files", "use_usp",
    }  # fmt: skip
    assert set(defaults(WanVideoPipeline.from_pretrained)) == pretrained
    saving = defaults(diffsynth.save_video)
    assert set(saving) == {"fps", "quality", "ffmpeg_params", "crf", "codec", "pix_fmt", "metadata"}


def test_commands_and_flags() -> None:
    root: Any = typer.main.get_command(app)
    told = {"diffsynth": root, **root.commands}
    spelled = {
        name: {
            spelling
            for parameter in command.params
            for spelling in (*parameter.opts, *parameter.secondary_opts)
            if spelling not in ("--help", "-h")
        }
        for name, command in told.items()
    }
    assert spelled == FLAGS


# names of DiffSynth-Studio's modules, and what scripts import from them
FOREIGN = {
    "diffsynth.core": ["ModelConfig", "load_state_dict"],
    "diffsynth.data": [],
    "diffsynth.data.video": [
        "LowMemoryImageFolder", "LowMemoryVideo", "VideoData", "crop_and_resize", "save_frames", "save_video",
    ],
    "diffsynth.models": ["ModelManager", "load_state_dict"],
    "diffsynth.models.utils": ["load_state_dict"],
    "diffsynth.pipelines": ["WanVideoPipeline"],
    "diffsynth.pipelines.wan_video": ["ModelConfig", "WanVideoPipeline"],
    "diffsynth.pipelines.wan_video_new": ["ModelConfig", "WanVideoPipeline"],
    "diffsynth.utils": ["ModelConfig"],
    "diffsynth.utils.data": [
        "LowMemoryImageFolder", "LowMemoryVideo", "VideoData", "crop_and_resize", "save_frames", "save_video",
    ],
}  # fmt: skip


@pytest.mark.parametrize("module", FOREIGN)
def test_foreign_modules_give_these_names(module: str) -> None:
    found = import_module(module)
    assert sorted(getattr(found, "__all__", [])) == FOREIGN[module]
    assert all(getattr(found, name) is not None for name in FOREIGN[module])


LIGHT = ["diffsynth", "diffsynth.cli.app", "diffsynth.tiny", "diffsynth.video"]
LIGHT += [
    "diffsynth.data.video",
    "diffsynth.utils.data",
    "diffsynth.core",
    "diffsynth.models",
    "diffsynth.pipelines",
]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_costs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, f"import {module} imports torch"

"""The flags of Wan's own ``generate.py``, spelled as there: one row each, in the table form of `flags`.

Sources: Wan2.1 ``generate.py`` (9737cba), Wan2.2 ``generate.py`` (42bf4cf).
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from diffsynth.cli.flags import FLAGS, Flag
from diffsynth.cli.tasks import SolverName, WanTaskName
from diffsynth.conditioning.argument import VIDEO

PANEL = "As of Wan's generate.py"

ExtendMethodName = Enum("ExtendMethodName", {"dashscope": "dashscope", "local_qwen": "local_qwen"}, type=str)
LanguageName = Enum("LanguageName", {"zh": "zh", "en": "en", "ch": "ch"}, type=str)  # ch: older READMEs


def _flag(name: str, kind: Any, told: str = "", *, spelling: str | None = None) -> Flag:
    """One row; a flag of bool is a switch, a flag that tells nothing is of later work and not shown."""
    return Flag(
        name=name, kind=kind, help=told, panel=PANEL, spellings=(spelling or f"--{name}",),
        default=False if kind is bool else None, is_hidden=not told,
    )  # fmt: skip


PROMPT_FLAG = _flag(
    "prompt_text", str, "The prompt, in place of the one without a name.", spelling="--prompt"
)
SIZE_FLAG = _flag(
    "size", str, "WIDTH*HEIGHT, pixels; with a picture: the area, in the picture's proportions."
)

TASK_FLAGS: tuple[Flag, ...] = (
    _flag("task", WanTaskName, "What to make, with the official settings: t2v-14B, i2v-A14B, ti2v-5B ..."),
    PROMPT_FLAG,
    SIZE_FLAG,
    _flag("frame_num", int, "As --num-frames; 81, of ti2v-5B 121, of t2i-14B 1."),
    _flag("ckpt_dir", str, "Folder of the model."),
    _flag("save_file", Path, "As --out; default: named after the task, the size, the prompt and the time."),
    _flag("base_seed", int, "As --seed; below 0, or left out: drawn."),
    _flag("sample_solver", SolverName, "As --sampler; unipc."),
    _flag("sample_steps", int, "As --steps; 50, of i2v and Wan2.2 14B 40."),
    _flag("sample_shift", float, "As --sigma-shift; 5, of t2v-A14B 12, of flf2v and vace 16."),
    _flag("sample_guide_scale", float, "As --cfg-scale, of both experts; 5, of t2v-A14B 4 and 3."),
    _flag("image", Path, "The first frame, of i2v and ti2v."),
    _flag("first_frame", Path, "The first frame, of flf2v."),
    _flag("last_frame", Path, "The last frame, of flf2v."),
    _flag("src_video", Path, "Of vace: what is known; it gives proportions and length as well."),
    _flag("src_mask", Path, "Of vace: white is made anew."),
    _flag("src_ref_images", str, "Of vace: pictures of what shall appear, with commas between them."),
    _flag("input_video_path", Path, "Of video_super_resolution: as --from of `diffsynth refine`."),
    _flag("offload_model", str, "True (default): networks rest on the host, and come to the GPU in turn."),
    _flag("t5_cpu", bool, "The text encoder computes on the CPU."),
    _flag("convert_model_dtype", bool, "Weights in bfloat16, which they are here unless --dtype says else."),
    # Of work to come: known, and told to be missing.
    _flag("ulysses_size", int),
    _flag("ring_size", int),
    _flag("t5_fsdp", bool),
    _flag("dit_fsdp", bool),
    _flag("use_prompt_extend", bool),
    _flag("prompt_extend_method", ExtendMethodName),
    _flag("prompt_extend_model", str),
    _flag("prompt_extend_target_lang", LanguageName),
    _flag("src_root_path", Path),
    _flag("refert_num", int),
    _flag("replace_flag", bool),
    _flag("use_relighting_lora", bool),
    _flag("num_clip", int),
    _flag("audio", Path),
    _flag("enable_tts", bool),
    _flag("tts_prompt_audio", Path),
    _flag("tts_prompt_text", str),
    _flag("tts_text", str),
    _flag("pose_video", Path),
    _flag("start_from_ref", bool),
    _flag("infer_frames", int),
)  # fmt: skip

# what takes several GPUs, and what rewrites the prompt
GPUS_FLAGS = ("dit_fsdp", "t5_fsdp", "ulysses_size", "ring_size")
EXTEND_FLAGS = (
    "use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang",
)  # fmt: skip

# of `generate`, but not of `refine`: read from the file, or decided by it
NOT_REFINED = (
    *(flag.name for flag in FLAGS if flag.argument is not None and flag.argument.refined == "decided"),
    "preview", "resume",
)  # fmt: skip

_REFINE_HELP = {
    "model": "Folder or file, or a hub id with --download. Default: the one that the file names, where it "
             "lies in this folder, the file's folder or models/.",
    "lora": "As of `generate`; default: those that the file names, found as --model is. none: without them.",
}  # fmt: skip
# what `make` reads beside the values of flags, with what it is where nothing says otherwise
BESIDE_FLAGS: dict[str, object] = {
    "from_file": (),  # names of the values that a file or a task told, and not the caller
    "offload": False,  # networks rest on the host
    "t5_cpu": False,
    "has_default_out": False,  # "out" is no name that the user gave
    "resumed": None,  # the `SavedRun` that goes on
    "read_files": (),  # files that are read, beside those that the flags name
}

REFINE_FLAGS: tuple[Flag, ...] = (
    Flag(name="source", kind=Path, panel=VIDEO, spellings=("--from",),
         help="What `generate --preview` or `generate` wrote: its settings are inside."),
    SIZE_FLAG,
    *(
        replace(flag, help=_REFINE_HELP.get(flag.name, flag.help))
        for flag in FLAGS if flag.name not in NOT_REFINED
    ),
)  # fmt: skip

"""The tasks of Wan's own ``generate.py``: what each makes and reads where its flags do not say otherwise.

Sources: Wan2.1 ``generate.py`` and ``wan/configs`` (9737cba), Wan2.2 the same (42bf4cf).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
SHAKING, CUTS = "镜头晃动，", "镜头切换，"  # put in front for pictures of Wan2.1: a shaking camera, cuts


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task: the official values of what a line leaves out."""

    width: int = 1280  # pixels, of --size
    height: int = 720
    grid: int = 16  # pixels that width and height are multiples of
    num_frames: int = 81
    fps: float = 16.0
    steps: int = 50
    shift: float = 5.0
    shift_480p: float | None = None  # in place of shift, where --size is 832*480 or 480*832
    cfg_scale: float = 5.0  # of the high-noise expert where there are two
    cfg_scale_low_noise: float | None = None
    solver: str = "unipc"
    negative_prompt: str = NEGATIVE_PROMPT
    reads: tuple[str, ...] = ()  # flags that not every task reads
    needs: tuple[str, ...] = ()  # those of them that must be there
    suffix: str = ".mp4"  # of a file without a name
    parallel: int = 2  # numbers of GPUs in the name of such a file: Ulysses and ring, or Ulysses alone
    lacks: str = ""  # what this version does not have; the task is known by its name alone


VACE_FLAGS = ("src_video", "src_mask", "src_ref_images")
S2V_FLAGS = (
    "image", "audio", "num_clip", "enable_tts", "tts_prompt_audio", "tts_prompt_text", "tts_text",
    "pose_video", "start_from_ref", "infer_frames",
)  # fmt: skip
ANIMATE_FLAGS = ("src_root_path", "refert_num", "replace_flag", "use_relighting_lora")

TASKS: dict[str, Task] = {
    "t2v-14B": Task(),
    # Officially 1280*720 as well, which this model's own list of sizes then refuses.
    "t2v-1.3B": Task(width=832, height=480),
    "i2v-14B": Task(
        steps=40, shift_480p=3.0, negative_prompt=SHAKING + NEGATIVE_PROMPT, reads=("image",),
        needs=("image",),
    ),
    "t2i-14B": Task(num_frames=1, suffix=".png"),
    "flf2v-14B": Task(
        shift=16.0, negative_prompt=CUTS + SHAKING + NEGATIVE_PROMPT, reads=("first_frame", "last_frame"),
        needs=("first_frame", "last_frame"),
    ),
    "vace-1.3B": Task(width=832, height=480, shift=16.0, reads=VACE_FLAGS),
    "vace-14B": Task(shift=16.0, reads=VACE_FLAGS),
    "t2v-A14B": Task(steps=40, shift=12.0, cfg_scale=4.0, cfg_scale_low_noise=3.0, parallel=1),
    "i2v-A14B": Task(
        steps=40, cfg_scale=3.5, cfg_scale_low_noise=3.5, reads=("image",), needs=("image",), parallel=1
    ),
    # Officially 1280*720 as well, which is not on this model's grid.
    "ti2v-5B": Task(height=704, grid=32, num_frames=121, fps=24.0, reads=("image",), parallel=1),
    "s2v-14B": Task(reads=S2V_FLAGS, lacks="Video from speech"),
    "animate-14B": Task(reads=ANIMATE_FLAGS, lacks="Video of an animated character"),
}  # fmt: skip
REFINE_TASK = "video_super_resolution"  # `diffsynth refine` by another name

WanTaskName = Enum(  # type: ignore[misc]  # its names are the table's
    "WanTaskName", {name: name for name in (*TASKS, REFINE_TASK)}, type=str
)
SolverName = Enum("SolverName", {"unipc": "unipc", "dpmpp": "dpm++"}, type=str)

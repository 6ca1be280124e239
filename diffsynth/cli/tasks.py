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


# What generate.py makes where no prompt is given: `EXAMPLE_PROMPT` there
CATS = (
    "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
)
BEACH = (
    "Summer beach vacation style, a white cat wearing sunglasses sits on a surfboard. The fluffy-furred "
    "feline gazes directly at the camera with a relaxed expression. Blurred beach scenery forms the "
    "background featuring crystal-clear waters, distant green hills, and a blue sky dotted with white "
    "clouds. The cat assumes a naturally relaxed posture, as if savoring the sea breeze and warm "
    "sunlight. A close-up shot highlights the feline's intricate details and the refreshing atmosphere "
    "of the seaside."
)
BIRD = (
    "CG动画风格，一只蓝色的小鸟从地面起飞，煽动翅膀。小鸟羽毛细腻，胸前有独特的花纹，背景是蓝天"
    "白云，阳光明媚。镜跟随小鸟向上移动，展现出小鸟飞翔的姿态和天空的广阔。近景，仰视视角。"
)
SNAKE = (
    "在一个欢乐而充满节日气氛的场景中，穿着鲜艳红色春服的小女孩正与她的可爱卡通蛇嬉戏。她的春服上绣着金色"
    "吉祥图案，散发着喜庆的气息，脸上洋溢着灿烂的笑容。蛇身呈现出亮眼的绿色，形状圆润，宽大的眼睛让它显得"
    "既友善又幽默。小女孩欢快地用手轻轻抚摸着蛇的头部，共同享受着这温馨的时刻。周围五彩斑斓的灯笼和彩带装"
    "饰着环境，阳光透过洒在她们身上，营造出一个充满友爱与幸福的新年氛围。"
)
BEAUTY = "一个朴素端庄的美人"


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
    lacks: str = ""  # the model that this version does not have; the task is known by its name alone
    example: str = ""  # the prompt of a line without one
    # what such a line reads besides, in Wan's own repository, where none of these flags is given
    example_files: tuple[tuple[str, str], ...] = ()


VACE_FLAGS = ("src_video", "src_mask", "src_ref_images")
S2V_FLAGS = (
    "image", "audio", "num_clip", "enable_tts", "tts_prompt_audio", "tts_prompt_text", "tts_text",
    "pose_video", "start_from_ref", "infer_frames",
)  # fmt: skip
ANIMATE_FLAGS = ("src_root_path", "refert_num", "replace_flag", "use_relighting_lora")

BEACH_FILES = (("image", "examples/i2v_input.JPG"),)
BIRD_FILES = (
    ("first_frame", "examples/flf2v_input_first_frame.png"),
    ("last_frame", "examples/flf2v_input_last_frame.png"),
)
SNAKE_FILES = (("src_ref_images", "examples/girl.png,examples/snake.png"),)

# of generate.py of Wan2.1 and of Wan2.2, where no task is named
USUAL_TASK, USUAL_TASK_22 = "t2v-14B", "t2v-A14B"

TASKS: dict[str, Task] = {
    "t2v-14B": Task(example=CATS),
    # Officially 1280*720 as well, which this model's own list of sizes then refuses.
    "t2v-1.3B": Task(width=832, height=480, example=CATS),
    "i2v-14B": Task(
        steps=40, shift_480p=3.0, negative_prompt=SHAKING + NEGATIVE_PROMPT, reads=("image",),
        needs=("image",), example=BEACH, example_files=BEACH_FILES,
    ),
    "t2i-14B": Task(num_frames=1, suffix=".png", example=BEAUTY),
    "flf2v-14B": Task(
        shift=16.0, negative_prompt=CUTS + SHAKING + NEGATIVE_PROMPT, reads=("first_frame", "last_frame"),
        needs=("first_frame", "last_frame"), example=BIRD, example_files=BIRD_FILES,
    ),
    "vace-1.3B": Task(
        width=832, height=480, shift=16.0, reads=VACE_FLAGS, example=SNAKE, example_files=SNAKE_FILES
    ),
    "vace-14B": Task(shift=16.0, reads=VACE_FLAGS, example=SNAKE, example_files=SNAKE_FILES),
    "t2v-A14B": Task(
        steps=40, shift=12.0, cfg_scale=4.0, cfg_scale_low_noise=3.0, parallel=1, example=CATS
    ),
    "i2v-A14B": Task(
        steps=40, cfg_scale=3.5, cfg_scale_low_noise=3.5, reads=("image",), needs=("image",), parallel=1,
        example=BEACH, example_files=BEACH_FILES,
    ),
    # Officially 1280*720 as well, which is not on this model's grid.
    "ti2v-5B": Task(
        height=704, grid=32, num_frames=121, fps=24.0, reads=("image",), parallel=1, example=CATS
    ),
    "s2v-14B": Task(reads=S2V_FLAGS, lacks="Wan2.2-S2V-14B, video from speech,"),
    "animate-14B": Task(reads=ANIMATE_FLAGS, lacks="Wan2.2-Animate-14B, video of an animated character,"),
}  # fmt: skip
REFINE_TASK = "video_super_resolution"  # `diffsynth refine` by another name

WanTaskName = Enum(  # type: ignore[misc]  # its names are the table's
    "WanTaskName", {name: name for name in (*TASKS, REFINE_TASK)}, type=str
)
SolverName = Enum("SolverName", {"unipc": "unipc", "dpmpp": "dpm++"}, type=str)

"""Lines of Wan's own generate.py as lines of ``diffsynth generate``."""

from __future__ import annotations

import json
import shlex
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command

from diffsynth import VideoData, read_metadata, save_video
from diffsynth.cli import generate
from diffsynth.cli.app import app
from diffsynth.cli.flags import FLAGS
from diffsynth.cli.generate_task import (
    Fit,
    Picked,
    fit_source,
    official_name,
    parse_size,
    with_example,
    with_task,
)
from diffsynth.cli.task_flags import TASK_FLAGS
from diffsynth.cli.tasks import NEGATIVE_PROMPT, TASKS
from diffsynth.errors import ArgumentError, DiffSynthError, UnusedInputError
from diffsynth.tiny import tiny_folder
from tests.unit.cli.running import Shell

DATA = Path(__file__).parents[2] / "data" / "cli" / "wan_readme_commands.json"
COMMANDS: list[dict[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))["commands"]
PICTURES = ("image", "first_frame")  # beside them --size is an area
LATER = {
    "--dit_fsdp": 0, "--t5_fsdp": 0, "--ulysses_size": 1, "--use_prompt_extend": 0,
    "--prompt_extend_method": 1, "--prompt_extend_model": 1, "--prompt_extend_target_lang": 1,
}  # fmt: skip


def place(command: dict[str, Any]) -> str:
    return f"{command['readme']}-{command['row']}"


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The prompt, and the values of our flags, of the words behind ``diffsynth generate``."""
    command: Any = get_command(app).commands["generate"]  # type: ignore[attr-defined]
    values = dict(command.make_context("generate", [*words]).params)
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    prompt = values.pop("prompt") or values["prompt_text"] or ""
    return prompt, with_task(prompt, values)


def words_of(command: dict[str, Any]) -> list[str]:
    return shlex.split(command["line"].split("generate.py", 1)[1])


def without_later(words: list[str]) -> list[str]:
    kept: list[str] = []
    skip = 0
    for word in words:
        if skip:
            skip -= 1
        elif word in LATER:
            skip = LATER[word]
        else:
            kept.append(word)
    return kept


def expected(official: dict[str, Any]) -> dict[str, Any]:
    """What `pipe()` and the writer are given, of the official value of each argument."""
    scale = official["sample_guide_scale"]
    low, high = scale if isinstance(scale, list) else (None, scale)
    width, height = map(int, official["size"].split("*"))
    is_area = any(name in official for name in PICTURES)
    references = official.get("src_ref_images")
    is_picture = official["task"].startswith("t2i")
    return {
        "num_frames": official["frame_num"], "num_inference_steps": official["sample_steps"],
        "sigma_shift": official["sample_shift"], "sampler": official["sample_solver"], "cfg_scale": high,
        "cfg_scale_low_noise": low, "negative_prompt": official["negative_prompt"],
        "seed": None if official["base_seed"] < 0 else official["base_seed"],
        "model": [official["ckpt_dir"]],
        "max_area": width * height if is_area else None,
        "width": None if is_area else width, "height": None if is_area else height,
        "input_image": next((Path(official[name]) for name in PICTURES if name in official), None),
        "end_image": Path(official["last_frame"]) if "last_frame" in official else None,
        "vace_reference_image": [Path(one) for one in references.split(",")] if references else [],
        "fps": None if is_picture else official["fps"], "t5_cpu": official["t5_cpu"],
        "offload": official.get("offload_model", True),  # on one GPU
    }  # fmt: skip


def test_the_table_holds_every_line() -> None:
    assert [sum(row["readme"] == name for row in COMMANDS) for name in ("Wan2.1", "Wan2.2")] == [19, 18]
    assert sum("later" not in row for row in COMMANDS) == 10
    assert {row["official"]["task"] for row in COMMANDS if "official" in row} == set(TASKS) - {
        "s2v-14B",
        "animate-14B",
    }


@pytest.mark.parametrize("command", [row for row in COMMANDS if "official" in row], ids=place)
def test_a_line_of_the_readmes_has_the_official_value_of_each_argument(command: dict[str, Any]) -> None:
    words = words_of(command)
    assert (without_later(words) == words) == ("later" not in command)
    prompt, values = parsed(without_later(words))
    official = command["official"]
    assert prompt == official["prompt"]
    told = expected(official)
    assert {name: values[name] for name in told} == told
    assert values["out"].suffix == (".png" if official["task"] == "t2i-14B" else ".mp4")
    assert values["out"].name.startswith(f"{official['task']}_{official['size']}_1_")


@pytest.mark.parametrize("command", [row for row in COMMANDS if "later" in row], ids=place)
def test_a_line_of_later_work_says_what_is_not_there_yet(command: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="is not in this version") as error:
        parsed(words_of(command))
    told = str(error.value).split(":")[0]
    is_gpus = "--dit_fsdp" in command["later"]
    assert told.removeprefix("--task ").split(", ")[0] == command["later"][0], told
    assert not is_gpus or told == ", ".join(command["later"][:3])


CATS_LINE = "--task t2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-T2V-14B --prompt cats --use_prompt_extend"
BEAUTY_LINE = "--task t2i-14B --size 1024*1024 --ckpt_dir ./Wan2.1-T2V-14B --prompt '‰∏Ä‰∏™ Êú¥'"
GPUS_LINE = "--dit_fsdp --t5_fsdp --ulysses_size 8 --base_seed 0 --frame_num 1"
# lines of older and broken copies of the READMEs, and of a page about two stages
COPIES = [
    (
        f"{CATS_LINE} --prompt_extend_method dashscope --prompt_extend_target_lang ch",
        "extends the prompt is not",
    ),
    (
        f"{CATS_LINE} --prompt_extend_method local_qwen --prompt_extend_target_lang ch",
        "extends the prompt is not",
    ),
    (BEAUTY_LINE, ""),
    (f"{GPUS_LINE} {BEAUTY_LINE}", "one video on several GPUs is not in this version"),
    (f"{BEAUTY_LINE} --use_prompt_extend", "extends the prompt is not in this version"),
    (f"{GPUS_LINE} {BEAUTY_LINE} --use_prompt_extend", "one video on several GPUs is not in this version"),
    (
        "--task video_super_resolution --input_video_path /path/to/low_res.mp4 --size 1920*1080 "
        "--save_file hd.mp4",
        "/path/to/low_res.mp4 does not exist",
    ),
    (
        "--task i2v-A14B --init_video /path/to/low_res.mp4 --size 1920*1080 --denoising_strength 0.5 "
        "--sample_steps 50",
        "There is no prompt; give one",
    ),
]
REASONS = {
    "--dit_fsdp": "one video on several GPUs is not in this version",
    "--use_prompt_extend": "a language model that extends the prompt is not in this version",
    "s2v-14B": "--task s2v-14B: Wan2.2-S2V-14B, video from speech, is not in this version",
    "animate-14B": "--task animate-14B: Wan2.2-Animate-14B, video of an animated character, is not in this",
}


def all_lines() -> list[Any]:
    """Every official line, with the reason for which it stops; none where it works."""
    told = [
        pytest.param(words_of(row), REASONS[row["later"][0]] if "later" in row else "", id=place(row))
        for row in COMMANDS
    ]
    return told + [
        pytest.param(shlex.split(line), why, id=f"copy-{i}") for i, (line, why) in enumerate(COPIES)
    ]


def test_the_lines_are_45() -> None:
    assert len(all_lines()) == 45 and sum(not line.values[1] for line in all_lines()) == 11


@pytest.mark.parametrize(("words", "reason"), all_lines())
def test_an_official_line_works_or_says_why_not(
    words: list[str], reason: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(generate, "make", lambda prompt, values: made.append(prompt))
    ran = shell("generate", *words)
    assert (ran.status == 0) == bool(made) == (not reason), ran.err
    assert reason in " ".join(ran.err.replace("│", " ").split()) and "Traceback" not in ran.err


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if not row.lacks])
def test_a_line_without_a_prompt_makes_the_official_example(
    task: str, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(generate, "make", lambda prompt, values: made.append((prompt, values)))
    monkeypatch.chdir(tmp_path)
    files = [path for _, paths in TASKS[task].example_files for path in paths.split(",")]
    line = ("generate", "--task", task, "--ckpt_dir", "folder")
    if files:
        ran = shell(*line)
        assert ran.status == 1 and f"{files[0]}" in ran.err and "is not in this folder" in ran.err
    (tmp_path / "examples").mkdir()
    for path in files:
        (tmp_path / path).touch()
    ran = shell(*line)
    [(prompt, values)] = made
    assert ran.status == 0 and "--prompt is not given: the official example of" in ran.err
    prompts = {row["official"]["prompt"] for row in COMMANDS if row.get("official", {}).get("task") == task}
    assert prompt in prompts | {f"{one}." for one in prompts} or task == "flf2v-14B", "as in the READMEs"
    given = [values[name] for name in ("input_image", "end_image", "vace_reference_image") if values[name]]
    assert [str(path) for one in given for path in (one if isinstance(one, list) else [one])] == files


def test_an_input_of_ones_own_takes_the_example_prompt_and_no_example_picture(shell: Shell) -> None:
    values = {
        **dict.fromkeys(flag.name for flag in (*FLAGS, *TASK_FLAGS)),
        "task": "i2v-14B",
        "image": Path("a"),
    }
    prompt, filled = with_example(None, values)
    assert prompt == TASKS["i2v-14B"].example and filled["image"] == Path("a")
    assert with_example(None, {**values, "input_video": Path("a.mp4")})[0] is None, "not of this video"
    assert with_example("", values)[0] == "", "an empty prompt is one"


@pytest.mark.parametrize(
    ("line", "task"),
    [("", "t2v-14B"), ("--convert_model_dtype", "t2v-A14B"), ("--sample_steps 4 --size 832*480", "t2v-14B")],
)
def test_a_line_without_a_task_is_of_the_official_one(
    line: str, task: str, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(generate, "make", lambda prompt, values: made.append(values))
    ran = shell("generate", "a cat", "--ckpt_dir", tmp_path, *line.split())
    assert ran.status == 0 and f"--task is not given: {task}" in ran.err
    assert made[0]["sigma_shift"] == TASKS[task].shift and made[0]["model"] == [str(tmp_path)]
    (tmp_path / "high_noise_model").mkdir()
    shell("generate", "a cat", "--ckpt_dir", tmp_path, *line.split())
    assert made[1]["sigma_shift"] == 12.0, "two experts are of Wan2.2"


LINE = ["a cat", "--ckpt_dir", "folder"]


@pytest.mark.parametrize("size", ["832*480", "480*832"])
def test_i2v_of_480p_has_its_own_shift(size: str) -> None:
    line = [*LINE, "--task", "i2v-14B", "--image", "a.png"]
    assert parsed([*line, "--size", size])[1]["sigma_shift"] == 3.0
    assert parsed(line)[1]["sigma_shift"] == 5.0
    assert parsed([*line, "--size", size, "--sample_shift", "4"])[1]["sigma_shift"] == 4.0


def test_what_is_left_out_is_as_officially() -> None:
    sizes = {"t2v-14B": (1280, 720), "t2v-1.3B": (832, 480), "vace-1.3B": (832, 480), "ti2v-5B": (1280, 704)}
    for task, (width, height) in sizes.items():
        values = parsed([*LINE, "--task", task])[1]
        assert (values["width"], values["height"], values["max_area"]) == (width, height, None), task
    values = parsed([*LINE, "--task", "ti2v-5B", "--image", "a.png"])[1]
    assert (values["width"], values["max_area"], values["num_frames"], values["fps"]) == (
        None, 1280 * 704, 121, 24.0,
    )  # fmt: skip
    assert values["negative_prompt"] == NEGATIVE_PROMPT


def test_our_own_flags_stand_beside_and_win_over_what_is_left_out() -> None:
    line = [*LINE, "--task", "t2v-A14B"]
    values = parsed([*line, "--steps", "20", "--cfg-scale", "5", "--negative-prompt", "", "--fps", "8"])[1]
    assert (values["num_inference_steps"], values["negative_prompt"], values["fps"]) == (20, "", 8.0)
    assert (values["cfg_scale"], values["cfg_scale_low_noise"]) == (5.0, None), "one scale for both experts"
    assert parsed([*line, "--sample_guide_scale", "6"])[1]["cfg_scale_low_noise"] is None
    distilled = parsed([*line, "--preset", "lightx2v-4step"])[1]
    assert [distilled[name] for name in ("num_inference_steps", "cfg_scale", "sampler")] == [None] * 3
    assert parsed([*line, "--height", "480", "--width", "640"])[1]["height"] == 480
    seeds = [parsed([*line, "--base_seed", text])[1]["seed"] for text in ("-1", "0", "7")]
    assert seeds == [None, 0, 7]
    folder = parsed([*line, "--init_video", "a.mp4", "--denoising_strength", "0.7"])[1]
    assert (folder["input_video"], folder["denoising_strength"]) == (Path("a.mp4"), 0.7)


def test_truth_values_are_spelled_as_officially() -> None:
    line = [*LINE, "--task", "t2v-14B", "--offload_model"]
    assert [parsed([*line, text])[1]["offload"] for text in ("True", "yes", "1", "False", "n")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match="give True or False"):
        parsed([*line, "maybe"])


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("--task t2v-14B --image a.png", UnusedInputError, "is not read by --task t2v-14B; it is for i2v"),
        ("--task i2v-14B --src_video a.mp4", UnusedInputError, "--src_video is not read"),
        ("--task t2v-14B --audio a.wav", UnusedInputError, "it is for s2v-14B"),
        ("--task t2v-14B --refert_num 1", UnusedInputError, "it is for animate-14B"),
        ("--task t2v-14B --input_video_path a.mp4", UnusedInputError, "it is for video_super_resolution"),
        ("--task i2v-A14B", ArgumentError, "needs --image FILE"),
        ("--task flf2v-14B --first_frame a.png", ArgumentError, "needs --last_frame FILE"),
        ("--task vace-14B --src_mask a.mp4", ArgumentError, "--src_video, which is missing"),
        ("--task t2i-14B --frame_num 5", ArgumentError, "makes a picture and --frame_num is 5"),
        ("--task ti2v-5B --size 1280*720", ArgumentError, "multiples of 32 pixels, near height 720 704 and"),
        ("--task t2v-14B --size big", ArgumentError, "give WIDTH*HEIGHT"),
        ("--task t2v-14B --size 832*480 --height 480", ArgumentError, "--size replaces --height"),
        ("--task t2v-14B --sample_steps 4 --steps 4", ArgumentError, "two names of one thing"),
        ("--task t2v-14B --model m", ArgumentError, "--ckpt_dir and --model are two names"),
        ("--task t2v-14B --convert_model_dtype --dtype fp32", ArgumentError, "keeps the weights in bfloat16"),
        ("--task t2v-14B --ring_size 2", ArgumentError, "--ring_size 2: one video on several GPUs"),
        ("--task t2v-14B --prompt_extend_target_lang ch", ArgumentError, "extends the prompt"),
        ("--sample_steps 4", UnusedInputError, "give --task or --ckpt_dir as well, or --num-inference-steps"),
        ("--ulysses_size 8", UnusedInputError, "give --task or --ckpt_dir as well"),
        ("--size 64*64 --width 64", ArgumentError, "--size replaces --width"),
    ],
)  # fmt: skip
def test_a_flag_that_makes_no_sense_is_told(line: str, kind: type[DiffSynthError], words: str) -> None:
    with pytest.raises(kind) as error:
        parsed([*LINE, *line.split()] if "--task" in line else ["a cat", *line.split()])
    assert words in str(error.value)


def test_a_task_without_a_folder_is_told() -> None:
    with pytest.raises(ArgumentError, match="needs --ckpt_dir FOLDER"):
        parsed(["a cat", "--task", "t2v-14B"])


def test_one_gpu_is_no_later_work() -> None:
    line = [*LINE, "--task", "t2v-14B", "--ulysses_size", "1", "--ring_size", "1"]
    assert parsed(line)[1]["num_frames"] == 81


def test_a_size_without_a_task_is_width_and_height_or_an_area() -> None:
    assert parse_size("832*480") == parse_size("832x480") == (832, 480)
    values = parsed(["a cat", "--size", "832*480"])[1]
    assert (values["width"], values["height"], values["max_area"]) == (832, 480, None)
    values = parsed(["a cat", "--size", "832*480", "--input-image", "a.png"])[1]
    assert (values["width"], values["height"], values["max_area"]) == (None, None, 832 * 480)


def test_a_prompt_is_told_once(shell: Shell) -> None:
    ran = shell("generate", "a", "--prompt", "b")
    assert ran.status == 2 and "told twice" in ran.err
    assert shell("generate").status == 2 and "no prompt" in shell("generate").err


def test_a_file_is_named_as_officially() -> None:
    prompt = "Two anthropomorphic cats in comfy / boxing gear and bright gloves"
    name = official_name("t2v-14B", TASKS["t2v-14B"], (1280, 720), prompt)
    assert name.startswith("t2v-14B_1280*720_1_1_Two_anthropomorphic_cats_in_comfy___boxing_gear_an_2")
    assert official_name("ti2v-5B", TASKS["ti2v-5B"], (1280, 704), "a").startswith("ti2v-5B_1280*704_1_a_2")


# (frames, height, width), area -> height, width, number of frames; measured on the reference (facts, 13.3)
SOURCES = [
    ((81, 480, 832), 1280 * 720, (480, 832, 81)),
    ((81, 480, 832), 832 * 480, (480, 832, 81)),
    ((200, 1080, 1920), 1280 * 720, (720, 1280, 81)),
    ((200, 1080, 1920), 832 * 480, (480, 832, 81)),
    ((81, 1280, 720), 1280 * 720, (1280, 720, 81)),
    ((81, 1280, 720), 832 * 480, (848, 464, 81)),
    ((33, 240, 320), 1280 * 720, (240, 320, 33)),
]


@pytest.mark.parametrize(("source", "area", "made"), SOURCES, ids=str)
def test_a_source_of_vace_is_fitted_as_officially(
    source: tuple[int, int, int], area: int, made: tuple[int, int, int]
) -> None:
    fit = fit_source(*source, area=area)
    assert (fit.height, fit.width, len(fit.frames)) == made
    assert fit.frames[0] == 0 and fit.frames[-1] == source[0] - 1
    assert len(fit.frames) < source[0] or fit.frames == tuple(range(source[0]))


def test_a_source_of_vace_sets_size_and_length(tmp_path: Path) -> None:
    video = tmp_path / "in.mp4"
    save_video([Image.new("RGB", (64, 32), (20 * i, 0, 0)) for i in range(10)], video)
    line = [*LINE, "--task", "vace-1.3B", "--src_video", str(video), "--src_mask", str(video)]
    values = parsed(line)[1]
    assert (values["height"], values["width"], values["num_frames"]) == (32, 64, 9)
    assert fit_source(10, 32, 64, area=832 * 480) == Fit(32, 64, (0, 1, 2, 3, 4, 5, 7, 8, 9))
    picked = values["vace_video"]
    assert isinstance(picked, Picked) and len(picked) == len(picked[:]) == len(list(picked)) == 9
    assert picked[6].tobytes() == VideoData(video)[7].tobytes()
    with pytest.raises(ArgumentError, match="--src_video tells size and length"):
        parsed([*line, "--height", "32"])


def test_help_tells_the_flags_that_work_and_hides_the_others(shell: Shell) -> None:
    text = shell("generate", "--help").out
    for flag in TASK_FLAGS:
        assert (flag.spellings[0] in text.split()) != flag.is_hidden, flag.name


def test_a_line_runs_with_the_tiny_wan_and_its_text_encoder_on_the_cpu(shell: Shell, tmp_path: Path) -> None:
    paths = (tmp_path / "plain.mp4", tmp_path / "t5_cpu.mp4")
    for path, more in zip(paths, ((), ("--t5_cpu", "--offload_model", "False")), strict=True):
        ran = shell(
            "generate", "--task", "t2v-1.3B", "--size", "64*32", "--frame_num", 5, "--sample_steps", 2,
            "--base_seed", 3, "--ckpt_dir", tiny_folder(), "--prompt", "a red circle", "--save_file", path,
            "--device", "cpu", *more,
        )  # fmt: skip
        assert ran.status == 0, ran.err
        settings = read_metadata(path)
        told = {
            "prompt": "a red circle", "negative_prompt": NEGATIVE_PROMPT, "seed": 3, "width": 64,
            "height": 32, "num_frames": 5, "num_inference_steps": 2, "sampler": "unipc", "sigma_shift": 5.0,
            "cfg_scale": 5.0, "fps": 16.0,
        }  # fmt: skip
        assert told.items() <= settings.items()
    one, other = (VideoData(path) for path in paths)
    assert one.shape() == (32, 64) and len(one) == 5
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))

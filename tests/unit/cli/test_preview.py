"""``diffsynth generate --preview``: small videos of several seeds, and one sheet of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from diffsynth import VideoData, read_metadata
from diffsynth.cli.preview import few_steps, line_for_refining, share_of, smaller
from diffsynth.conditioning.facts import DiTFacts
from tests.unit.cli.running import Shell


def parts(**generation: object) -> Any:
    """What `smaller` asks of a pipeline's parts, of a Wan2.1 model."""
    config = SimpleNamespace(patch_size=(1, 2, 2), out_dim=16)
    return SimpleNamespace(
        spatial_stride=8, facts=DiTFacts(), high=SimpleNamespace(dit=SimpleNamespace(config=config)),
        low=None, family="t2v", generation=generation,
    )  # fmt: skip


def test_a_preview_has_half_the_sides_and_a_quarter_of_the_steps() -> None:
    small, full = smaller({"prompt": "a cat"}, parts())
    assert full == {"height": 480, "width": 832, "num_inference_steps": 50}
    assert small == {"prompt": "a cat", "height": 240, "width": 416, "num_inference_steps": 13}
    small, full = smaller({"height": 720, "width": 1280, "num_inference_steps": 40}, parts())
    assert (small["height"], small["width"], small["num_inference_steps"]) == (352, 640, 10)
    assert full == {"height": 720, "width": 1280, "num_inference_steps": 40}


def test_a_preview_beside_a_picture_has_a_quarter_of_its_area() -> None:
    small, full = smaller({"max_area": 720 * 1280}, parts())
    assert small["max_area"] == 360 * 640 and "height" not in small
    assert full == {"max_area": 720 * 1280, "num_inference_steps": 50}


def test_what_is_small_or_fast_already_is_left_so() -> None:
    assert [few_steps(steps) for steps in (1, 4, 8, 20, 40, 50)] == [1, 4, 8, 8, 10, 13]
    assert [share_of(side) for side in (64, 240, 320, 480, 1080)] == [1.0, 1.0, 0.75, 0.5, 0.5]
    small, _ = smaller({"preset": "lightx2v-4step"}, parts())
    assert small["num_inference_steps"] == 4


def test_the_line_that_goes_on_keeps_what_the_file_does_not_tell() -> None:
    values: dict[str, Any] = {
        "model": ["my models/a.safetensors", "b.pth"], "dit": ["a"], "lora": ["style.safetensors:0.8"],
        "vram": "12", "dtype": "fp8", "num_persistent": 0, "attention": "sdpa",
        "input_image": Path("cat.png"), "tiled": False,
        "vace_reference_image": [Path("a.png"), Path("b.png")], "crf": 12.0, "keep_latents": True,
        "download": False,
        "seed": 7, "num_inference_steps": 20, "cfg_scale": 4.0, "sampler": "unipc", "out": Path("v.mp4"),
        "fps": 8.0,
        "preview": True, "num_videos_per_prompt": 2, "tile_size": (30, 52), "offload": False, "t5_cpu": False,
        "cache_text": Path("texts"), "preset": None,
    }  # fmt: skip
    line = line_for_refining(Path("v-1.mp4"), values)
    assert line == (
        "diffsynth refine --from v-1.mp4 --cache-text texts --input-image cat.png "
        "--vace-reference-image a.png --vace-reference-image b.png "
        "--model 'my models/a.safetensors' --model b.pth --dit a "
        "--lora style.safetensors:0.8 --dtype fp8 --vram 12 --num-persistent 0 --attention sdpa --crf 12.0 "
        "--keep-latents"
    )
    officially = {**values, "model": ["Wan2.1"], "offload": True, "t5_cpu": True}
    line = line_for_refining(Path("v-1.mp4"), officially)
    assert line.startswith(
        "diffsynth generate --task video_super_resolution --input_video_path v-1.mp4 --t5_cpu "
    )
    assert " --model Wan2.1 " in line


def test_previews_and_their_sheet_are_written(shell: Shell, toy_folder: Path, tmp_path: Path) -> None:
    line = ("a red circle", "--model", toy_folder, "--device", "cpu", "--dtype", "fp32", "--preview")
    ran = shell("generate", *line, "--seed", 7, "--steps", 12, "--out", tmp_path / "v.mp4")
    assert ran.status == 0, ran.err
    names = [f"v-{i}.mp4" for i in (1, 2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "v-sheet.png"]
    settings = [read_metadata(tmp_path / name) for name in names]
    assert [each["seed"] for each in settings] == [7, 8, 9, 10]
    full = {"height": 16, "width": 32, "num_inference_steps": 12}
    assert all(each["preview_of"] == full and each["num_inference_steps"] == 8 for each in settings)
    assert read_metadata(tmp_path / "v-sheet.png")["sheet_of"] == names
    assert f"diffsynth refine --from {tmp_path}/v-1.mp4" in ran.out.splitlines()[-1]
    # Four frames of each, from the first to the last, one row per video.
    sheet = np.asarray(Image.open(tmp_path / "v-sheet.png")).astype(int)
    for row, name in enumerate(names):
        video = VideoData(tmp_path / name)
        for column, frame in enumerate((0, 1, 3, 4)):
            top, left = 8 + row * (14 + 16 + 8) + 14, 8 + column * (32 + 8)
            assert np.array_equal(sheet[top : top + 16, left : left + 32], np.asarray(video[frame]))


def test_previews_of_pictures_make_a_sheet_too(shell: Shell, toy_folder: Path, tmp_path: Path) -> None:
    line = ("a red circle", "--model", toy_folder, "--device", "cpu", "--preview", "--quiet")
    ran = shell("generate", *line, "--num-videos-per-prompt", 2, "--out", tmp_path / "p.png")
    assert ran.status == 0, ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-1.png", "p-2.png", "p-sheet.png"]


def test_a_sheet_that_cannot_be_written_is_known_first(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "v-sheet.png").mkdir()
    ran = shell("generate", "a", "--preview", "--out", tmp_path / "v.mp4")
    assert ran.status == 1 and "v-sheet.png" in ran.err and "Loaded" not in ran.err

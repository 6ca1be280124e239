"""``diffsynth refine``: a preview made large, by the settings inside its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffsynth import VideoData, read_metadata, save_image, save_video
from diffsynth.cli import generate
from diffsynth.cli.refine import refined
from diffsynth.errors import ArgumentError
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.cli.running import Shell

SETTINGS: dict[str, object] = {
    "prompt": "a cat", "negative_prompt": "grey", "seed": 12, "height": 240, "width": 416, "num_frames": 81,
    "num_inference_steps": 13, "cfg_scale": 6.0, "sigma_shift": 8.0, "sampler": "unipc", "fps": 16.0,
    "precision": "official", "models": {"dit": "wan/dit.safetensors"},
    "preview_of": {"height": 480, "width": 832, "num_inference_steps": 50},
}  # fmt: skip


def preview(path: Path, **changes: object) -> Path:
    """A file that holds the settings of a preview."""
    metadata = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not None}
    save_video([Image.new("RGB", (416, 240))] * 5, path, metadata=metadata)
    return path


def asked(path: Path, **values: Any) -> dict[str, Any]:
    return refined(path, None, values)[1]


def test_the_file_tells_everything_but_size_steps_and_strength(tmp_path: Path) -> None:
    path = preview(tmp_path / "v-2.mp4")
    prompt, values = refined(path, None, {})
    same = (
        "negative_prompt",
        "seed",
        "num_frames",
        "cfg_scale",
        "sigma_shift",
        "sampler",
        "fps",
        "precision",
    )
    assert prompt == "a cat" and {name: values[name] for name in same} == {
        name: SETTINGS[name] for name in same
    }
    assert (values["height"], values["width"]) == (480, 832), "those of the full run"
    assert (values["input_video"], values["denoising_strength"]) == (path, 0.5)
    assert values["num_inference_steps"] == 25, "of 50 steps those below the strength"
    assert values["out"] == tmp_path / "v-2-refined.mp4"


def test_flags_win(tmp_path: Path) -> None:
    path = preview(tmp_path / "v.mp4")
    prompt, values = refined(path, "a dog", {"size": "1280*720", "denoising_strength": 0.3, "seed": 1})
    assert (prompt, values["height"], values["width"], values["seed"]) == ("a dog", 720, 1280, 1)
    assert values["num_inference_steps"] == 15
    assert asked(path, num_inference_steps=7)["num_inference_steps"] == 7
    distilled = asked(path, preset="lightx2v-4step")
    assert [distilled[name] for name in ("num_inference_steps", "cfg_scale", "sampler")] == [None] * 3
    assert asked(path, height=960)["height"] == 960
    with pytest.raises(ArgumentError, match="--size replaces --height"):
        asked(path, size="64*64", height=64)


def test_an_ordinary_video_is_made_twice_as_large(tmp_path: Path) -> None:
    values = asked(preview(tmp_path / "v.mp4", preview_of=None, num_inference_steps=40))
    assert (values["height"], values["width"], values["num_inference_steps"]) == (480, 832, 20)


def test_an_area_keeps_the_proportions_of_the_file(tmp_path: Path) -> None:
    full = {"max_area": 4 * 240 * 416, "num_inference_steps": 40}
    values = asked(preview(tmp_path / "v.mp4", preview_of=full, max_area=240 * 416))
    assert (values["height"], values["width"], values["max_area"]) == (480, 832, None)


def test_a_file_that_does_not_tell_how_it_was_made_is_refused(tmp_path: Path) -> None:
    save_video([Image.new("RGB", (32, 16))] * 5, tmp_path / "other.mp4")
    with pytest.raises(ArgumentError, match=r"other\.mp4 does not tell how it was made.*--input-video"):
        asked(tmp_path / "other.mp4")
    with pytest.raises(ArgumentError, match="--from is missing"):
        refined(None, None, {})


def test_loras_that_are_missing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = preview(tmp_path / "v.mp4", loras={"style.safetensors": 0.8})
    asked(path)
    assert "--lora style.safetensors:0.8" in caplog.text
    caplog.clear()
    asked(path, lora=["style.safetensors"], model=["wan"])
    assert caplog.text == ""


def test_a_picture_is_refined_to_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    save_image(Image.new("RGB", (416, 240)), path, metadata={**SETTINGS, "num_frames": 1})
    values = asked(path)
    assert values["input_video"][0].size == (416, 240) and values["out"].name == "p-refined.png"
    assert values["fps"] is None


def test_both_spellings_ask_for_the_same(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(generate, "make", lambda prompt, values: seen.append((prompt, dict(values))))
    path = preview(tmp_path / "v.mp4")
    more = ("--size", "1280*720", "--denoising-strength", "0.4")
    assert shell("refine", "--from", path, *more, "--model", "wan", "--steps", 6).status == 0
    task = ("--task", "video_super_resolution", "--input_video_path", path, "--ckpt_dir", "wan")
    assert shell("generate", *task, *more, "--sample_steps", 6).status == 0
    for _, values in seen:
        for name in ("task", "prompt_text"):
            values.pop(name, None)
    assert seen[0] == seen[1] and seen[0][1]["denoising_strength"] == 0.4 and seen[0][1]["model"] == ["wan"]
    for words, told in (
        (("--image", "a.png"), "--image is not read by --task video_super_resolution"),
        (("--preview",), "--preview is not read"),
        (("--steps", 3, "--sample_steps", 6), "two names of one thing"),
        (("--dit_fsdp",), "--dit_fsdp is not read"),
    ):
        ran = shell("generate", *task, *words)
        assert ran.status == 1 and told in ran.err, ran.err
    ran = shell("generate", "--task", "video_super_resolution", "--ckpt_dir", "wan")
    assert ran.status == 1 and "needs --input_video_path FILE" in ran.err


def test_a_preview_is_refined_on_a_model(shell: Shell, toy_folder: Path, tmp_path: Path) -> None:
    where = ("--model", toy_folder, "--device", "cpu", "--dtype", "float32", "--quiet")
    out = tmp_path / "v.mp4"
    line = ("a red circle", *where, "--preview", "--num-videos-per-prompt", 2, "--seed", 5, "--steps", 4)
    assert shell("generate", *line, "--out", out).status == 0
    chosen = tmp_path / "v-2.mp4"
    ran = shell("refine", "--from", chosen, "--size", "64*32", *where)
    assert ran.status == 0, ran.err
    settings = read_metadata(tmp_path / "v-2-refined.mp4")
    expected = {"seed": 6, "prompt": "a red circle", "denoising_strength": 0.5, "num_inference_steps": 2}
    assert expected.items() <= settings.items() and VideoData(tmp_path / "v-2-refined.mp4").shape() == (
        32,
        64,
    )
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    frames = pipe(
        "a red circle", seed=6, height=32, width=64, num_inference_steps=2, denoising_strength=0.5,
        input_video=VideoData(chosen),
    )  # fmt: skip
    save_video(frames, tmp_path / "same.mp4", fps=8)
    made = zip(VideoData(tmp_path / "same.mp4"), VideoData(tmp_path / "v-2-refined.mp4"), strict=True)
    assert all(one.tobytes() == other.tobytes() for one, other in made)

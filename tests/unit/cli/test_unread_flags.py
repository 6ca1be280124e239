"""Flags that nobody reads and numbers that cannot be end the command before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth.cli.generate import _without_unread
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.cli.running import Shell


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", 10**23), "seed is 100000000000000000000000; give 0 to"),
        (("--seed", -2), "seed is -2"),
        (("--num-videos-per-prompt", 10**9), "num_videos_per_prompt is 1000000000"),
        (("--steps", 10**9), "num_inference_steps is 1000000000"),
        (("--sigma-shift", "nan"), "sigma_shift is nan"),
        (("--download",), "--download says something of --model, which was not given"),
        (("--dit", "x.safetensors"), "--dit says something of --model"),
        (("--no-tiled", "--tile-size", 8, 8), "--no-tiled was given, so that --tile-size"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_they_end_the_command_before_a_model_is_loaded(
    arguments: tuple[object, ...], words: str, shell: Shell, tmp_path: Path
) -> None:
    ran = shell("generate", "a red circle", *arguments, "--out", tmp_path / "a.mp4")
    assert ran.status == 1 and words in ran.err and "Loaded" not in ran.err


def test_what_a_file_tells_and_a_model_does_not_read_is_left_out(
    toy_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diffsynth")
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    told = {"prompt": "x", "cfg_scale": 4.0, "cfg_scale_low_noise": 3.0, "switch_DiT_boundary": 0.9}
    assert _without_unread(pipe, told, tuple(told)) == {"prompt": "x", "cfg_scale": 4.0}
    assert "cfg_scale_low_noise=3.0 is left out: it is for two experts" in caplog.text
    assert _without_unread(pipe, told, ()) == told, "the caller's own are refused by the call"

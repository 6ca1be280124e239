"""``diffsynth generate`` with the inputs of a VACE model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import diffsynth
from diffsynth.models.toy import toy_files
from tests.pictures import smooth
from tests.unit.cli.running import Shell


def test_video_mask_and_references_reach_the_model(shell: Shell, tmp_path: Path) -> None:
    diffsynth.save_video([smooth()] * 5, tmp_path / "in.mp4")
    diffsynth.save_frames([np.full((48, 64, 3), 255, np.uint8)] * 5, tmp_path / "mask")
    diffsynth.save_image(smooth(), tmp_path / "who.png")
    models = [word for file in toy_files("vace") for word in ("--model", file)]
    picture = ("--vace-reference-image", tmp_path / "who.png")
    given = (
        *("--vace-video", tmp_path / "in.mp4", "--vace-video-mask", tmp_path / "mask", "--vace-scale", "0.5"),
        *picture,
        *picture,
    )
    made = []
    for number, more in enumerate(((), given)):
        out = tmp_path / f"{number}.mp4"
        ran = shell("generate", "a cat", *models, "--seed", 0, "--dtype", "float32", "--out", out, *more)
        assert ran.status == 0, ran.err
        made.append(np.stack([np.asarray(frame) for frame in diffsynth.VideoData(out)]))
    assert made[0].shape == made[1].shape and not np.array_equal(*made)
    assert diffsynth.read_metadata(tmp_path / "1.mp4")["vace_scale"] == 0.5

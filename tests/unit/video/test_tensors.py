"""Pictures to tensors and back; single pictures in files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import (
    ArgumentError,
    NotFiniteError,
    OutputPathError,
)
from diffsynth.video import (
    VideoData,
    frames_to_tensor,
    read_metadata,
    save_frames,
    save_image,
    tensor_to_frames,
    to_pil,
)
from tests.pictures import noise, smooth


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG"])
def test_pictures_keep_their_settings(tmp_path: Path, name: str) -> None:
    save_image(smooth(), tmp_path / name, metadata={"prompt": "圆", "seed": 3})
    assert read_metadata(tmp_path / name) == {"prompt": "圆", "seed": 3}


def test_numbered_pictures_are_lossless_and_read_back(tmp_path: Path) -> None:
    save_frames(torch.from_numpy(np.stack([noise(seed=s) for s in range(12)])), tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new"), key=lambda name: int(name[:-4]))[-1] == "11.png"
    video = VideoData(image_folder=tmp_path / "new")
    assert np.array_equal(np.asarray(video[11]), noise(seed=11))
    video.save_images(tmp_path / "copy")
    assert len(os.listdir(tmp_path / "copy")) == 12
    with pytest.raises(OutputPathError, match="is a file"):
        save_frames([noise()], tmp_path / "copy" / "0.png")
    with pytest.raises(ArgumentError, match=r"save as \.png"):
        save_image(noise(), tmp_path / "a.webp", metadata={"seed": 1})


def test_eight_bits_go_to_the_network_and_back_unchanged() -> None:
    pictures = [Image.fromarray(noise(seed=seed)) for seed in range(5)]
    tensor = frames_to_tensor(pictures, 48, 64)
    assert tensor.shape == (1, 3, 5, 48, 64) and tensor.dtype == torch.float32
    expected = torch.from_numpy(noise(seed=4)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(tensor[0, :, 4], expected)
    assert np.array_equal(tensor_to_frames(tensor)[0, 4], noise(seed=4))
    assert [image.tobytes() for image in to_pil(tensor_to_frames(tensor)[0])] == [
        p.tobytes() for p in pictures
    ]


def test_real_numbers_are_not_rounded_to_eight_bits() -> None:
    unit = torch.rand(4, 3, 8, 12)
    for frames in (unit, unit.numpy(), list(unit), unit.double()):
        assert torch.equal(frames_to_tensor(frames, 8, 12), (unit * 2 - 1).permute(1, 0, 2, 3)[None])
    assert frames_to_tensor(unit[0], 8, 12).shape == (1, 3, 1, 8, 12)


@pytest.mark.parametrize("grey", [torch.rand(1, 8, 12), np.random.rand(8, 12), np.eye(8, 12, dtype=bool)])
def test_a_grey_mask_has_three_equal_channels(grey: object) -> None:
    tensor = frames_to_tensor([grey], 8, 12)
    assert torch.equal(tensor[:, 0], tensor[:, 2]) and torch.equal(tensor[:, 0], tensor[:, 1])


def test_frames_of_another_size_are_fitted_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_frames([smooth(50, 90)], tmp_path)
    with caplog.at_level("INFO", logger="diffsynth"):
        tensor = frames_to_tensor(VideoData(image_folder=tmp_path), 40, 40)
    assert "frames of 90x50 were cropped in the middle and resized to 40x40" in caplog.text
    same = VideoData(image_folder=tmp_path, height=40, width=40)
    assert torch.equal(tensor, frames_to_tensor(same, 40, 40))
    unit = torch.from_numpy(smooth(50, 90)).permute(2, 0, 1) / 255
    # PIL rounds to 8 bits after each of its two passes, torch does not: up to one level apart
    assert (frames_to_tensor(unit, 40, 40) - tensor).abs().max() <= 2 / 255


def test_rounding_is_nearest_and_truncation_is_asked_for() -> None:
    levels = torch.tensor([-1.5, -1.0, 0.3 / 127.5 - 1, 0.7 / 127.5 - 1, 254.6 / 127.5 - 1, 1.0, 1.5])
    video = levels.view(1, 1, 1, 1, 7).expand(1, 3, 1, 1, 7)
    assert tensor_to_frames(video)[0, 0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert tensor_to_frames(video, rounding="truncate")[0, 0, 0, :, 0].tolist() == [0, 0, 0, 0, 254, 255, 255]
    assert tensor_to_frames(video.bfloat16()).shape == (1, 1, 1, 7, 3)
    with pytest.raises(NotFiniteError, match="float32"):
        tensor_to_frames(torch.where(levels == 1.0, float("nan"), video))
    with pytest.raises(NotFiniteError, match="float32"):
        tensor_to_frames(torch.where(levels == 1.0, float("inf"), video.bfloat16()))
    with pytest.raises(ArgumentError, match=r"give \(B, 3, F, H, W\)"):
        tensor_to_frames(video[0])
    with pytest.raises(ArgumentError, match="rounding"):
        tensor_to_frames(video, rounding="up")  # type: ignore[arg-type]


def test_importing_and_writing_ask_for_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, diffsynth.video as v\n"
        "assert 'torch' not in sys.modules and 'av' not in sys.modules\n"
        "v.save_video([numpy.zeros((8, 8, 3), 'u1')], sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])

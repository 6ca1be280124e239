"""Pixels of a clip: the frames that the plan names, cut and resized alike with its inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsynth.errors import MediaReadError
from diffsynth.training.dataset.clips import Clip
from diffsynth.training.dataset.config import DatasetConfig
from diffsynth.training.dataset.planning import plan_dataset
from diffsynth.training.dataset.reading import read_clip, read_frames
from diffsynth.video import load_image
from tests.pictures import number_of, write_odd
from tests.unit.training.dataset.conftest import Dataset


def clip_of(root: Path, **given: object) -> Clip:
    told = {"num_frames": (5,), "sizes": ((48, 64),), **given}
    config = DatasetConfig(path=str(root), **told)  # type: ignore[arg-type]
    return plan_dataset([config], model_fps=16).clips[-1]


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(Image.fromarray(np.asarray(frame))) for frame in frames]


def test_a_clip_has_the_frames_of_its_plan(dataset: Dataset) -> None:
    clip = clip_of(dataset("fast.mp4"), clip="middle")
    video = read_clip(clip).video
    assert video.shape == (5, 48, 64, 3) and str(video.dtype) == "torch.uint8"
    assert numbers(video.numpy()) == list(clip.indices)
    assert numbers(read_frames(clip, [0, 2])) == [clip.indices[0], clip.indices[2]]


def test_repeated_frames_are_the_same(dataset: Dataset) -> None:
    clip = clip_of(dataset("slow.webm"))
    assert numbers(read_clip(clip).video.numpy()) == [0, 1, 1, 2, 2]


def test_inputs_are_cut_and_mirrored_as_the_clip(dataset: Dataset) -> None:
    header = ("video", "text", "control_video", "input_image", "reference_image", "motion_bucket_id")
    root = dataset(("long.mp4", "a", "long.mp4", "still.png", "still.png", "40"), header=header)
    clip = clip_of(root, clip="middle", sizes=((32, 32),), flip=True)
    assert clip.flip
    pixels = read_clip(clip)
    assert (pixels.inputs["control_video"] == pixels.video).all()
    picture = np.asarray(load_image(root / "train" / "still.png").crop((8, 0, 56, 48)).resize((32, 32)))
    assert (pixels.inputs["input_image"].numpy() == picture[:, ::-1]).all()
    assert pixels.inputs["reference_image"].shape == (48, 64, 3), "the pipeline fits it itself"
    assert pixels.inputs["motion_bucket_id"] == 40
    plain = read_clip(dataclasses.replace(clip, flip=False))
    assert (plain.video.flip(2) == pixels.video).all()


def test_a_picture_is_a_clip_of_one_frame(dataset: Dataset) -> None:
    root = dataset("still.png")
    assert (
        read_clip(clip_of(root)).video[0].numpy() == np.asarray(load_image(root / "train/still.png"))
    ).all()


def test_a_frame_that_cannot_be_decoded_names_its_file(dataset: Dataset) -> None:
    clip = clip_of(dataset("long.mp4"))
    whole = clip.item.media.read_bytes()
    clip.item.media.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaReadError, match=r"long\.mp4"):
        read_clip(clip)


def test_pixels_that_are_not_square_are_shown_in_their_proportions(dataset: Dataset) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (48, 64, 3)).astype(np.uint8)
    root = dataset(("wide.mp4", "a ramp"), ("square.mp4", "a ramp"), ("narrow.mp4", "a ramp"))
    for name, sar in (("wide", "sar=2/1"), ("square", "keyint=1"), ("narrow", "sar=1/2")):
        write_odd(root / "train" / f"{name}.mp4", sar, [ramp] * 5)
    config = DatasetConfig(path=str(root), num_frames=(5,), sizes=((48, 64),))
    wide, square, narrow = plan_dataset([config], model_fps=16).clips
    # twice as wide as tall as it is stored: the middle half of its width fills the clip
    for clip, first in ((wide, 64), (square, 0), (narrow, 0)):
        row = read_clip(clip).video[0, 24, :, 0].tolist()
        assert row[0] == pytest.approx(first, abs=8) and row[-1] == pytest.approx(255 - first, abs=8)
    assert "pixel aspect" in wide.transform() and "pixel aspect" not in square.transform()


def test_inputs_keep_their_own_proportions(dataset: Dataset) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (48, 64, 3)).astype(np.uint8)
    root = dataset(("square.mp4", "a ramp", "wide.mp4"), header=("file_name", "text", "control_video"))
    write_odd(root / "train" / "square.mp4", "keyint=1", [ramp] * 5)
    write_odd(root / "train" / "wide.mp4", "sar=2/1", [ramp] * 5)
    clip = clip_of(root)
    pixels = read_clip(clip)
    assert pixels.video[0, 24, 0, 0] < 8 and 56 < pixels.inputs["control_video"][0, 24, 0, 0] < 72
    assert clip.transform()["pixel aspect of control_video"] == 2.0

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
from tests.pictures import number_of
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

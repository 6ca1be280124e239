"""Control videos: each task draws what it says, says what it lacks, and holds few frames at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from diffsynth.errors import ArgumentError, MissingPackageError
from diffsynth.video.flow_colours import flow_colours
from diffsynth.video.preprocess import CANNY_THRESHOLDS, SCRIBBLE_THRESHOLDS, TASKS, Options, preprocess

HEIGHT, WIDTH = 64, 96


def square(x: int, y: int = 20, size: int = 24) -> np.ndarray:
    """A textured square on a textured ground, which rests."""
    drawing = np.random.default_rng(0)
    frame = np.repeat(drawing.integers(0, 90, (HEIGHT, WIDTH, 1), np.uint8), 3, axis=2)
    texture = drawing.integers(90, 256, (size, size, 1), np.uint8)
    frame[y : y + size, x : x + size] = texture
    return frame


def test_grey_is_luma_in_three_channels() -> None:
    colours = np.zeros((1, 3, 3), np.uint8)
    colours[0, range(3), range(3)] = 255
    (grey,) = preprocess(colours[None], "grey")
    assert grey.tolist() == [[[76] * 3, [150] * 3, [29] * 3]], "ITU-R 601: .299, .587, .114"


@pytest.mark.parametrize("task", ["canny", "scribble"])
def test_lines_are_white_where_brightness_jumps(task: str) -> None:
    pytest.importorskip("cv2")
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[:, WIDTH // 2 :] = 200
    (drawn,) = preprocess([frame], task)
    assert drawn.shape == frame.shape and set(np.unique(drawn)) == {0, 255}
    columns = np.flatnonzero(drawn.any(axis=(0, 2)))
    assert abs(columns.mean() - WIDTH / 2) <= 1.5 and len(columns) <= 6
    assert drawn[8:-8, columns[len(columns) // 2]].all()


def soft_circle(sigma: float = 6.0) -> np.ndarray:
    y, x = np.mgrid[:128, :192]
    frame = np.where(((y - 64) ** 2 + (x - 96) ** 2 < 32**2)[:, :, None], np.uint8(220), np.uint8(20))
    picture = Image.fromarray(np.repeat(frame, 3, axis=2)).filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(picture)


@pytest.mark.parametrize("task", ["canny", "scribble"])
@pytest.mark.parametrize("sigma", [6.0, 12.0])
def test_lines_of_a_soft_picture_are_drawn_too(task: str, sigma: float) -> None:
    pytest.importorskip("cv2")
    (drawn,) = preprocess([soft_circle(sigma)], task)
    y, x = np.nonzero(drawn[:, :, 0])
    radius = np.hypot(y - 64, x - 96)
    assert len(y) >= 150 and abs(np.median(radius) - 32) <= 4, "the outline of the circle"
    (none,) = preprocess([soft_circle(sigma)], task, Options(thresholds=(300, 600)))
    assert not none.any()


@pytest.mark.parametrize("task", ["canny", "scribble"])
def test_a_sharp_picture_keeps_the_usual_thresholds(task: str) -> None:
    pytest.importorskip("cv2")
    usual = {"canny": CANNY_THRESHOLDS, "scribble": SCRIBBLE_THRESHOLDS}[task]
    (made,) = preprocess([soft_circle(0.5)], task)
    (asked,) = preprocess([soft_circle(0.5)], task, Options(thresholds=usual))
    assert np.array_equal(made, asked)


def test_noise_is_no_line() -> None:
    pytest.importorskip("cv2")
    noise = np.random.default_rng(0).normal(128, 3, (128, 192, 3)).clip(0, 255).astype(np.uint8)
    (drawn,) = preprocess([noise], "canny")
    assert (drawn > 0).mean() < 0.02


@pytest.mark.parametrize("task", ["grey", "canny", "scribble", "flow"])
def test_frames_that_show_nothing_are_counted(task: str, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("cv2")
    flat = np.full((64, 96, 3), 128, np.uint8)
    list(preprocess([flat] * 3, task))
    assert f"{task}: 3 of 3 frames show (almost) nothing" in caplog.text
    assert ("lower thresholds" in caplog.text) is (task in ("canny", "scribble"))
    caplog.clear()
    list(preprocess([square(20), square(24)], task))
    assert caplog.text == ""


def test_flow_has_the_hue_of_its_direction() -> None:
    pytest.importorskip("cv2")
    right, left, still = ([square(x) for x in xs] for xs in ((20, 24), (24, 20), (20, 20)))
    hues = []
    for frames in (right, left):
        first, second = preprocess(frames, "flow")
        assert np.array_equal(first, second)
        hues.append(second[32, 34].astype(int))
        assert (second[4, 4] > 200).all(), "what does not move is white"
    assert hues[0][0] > hues[0][2] and hues[1][2] >= hues[1][0], "right is red, left is cyan or blue"
    assert all((frame > 250).all() for frame in preprocess(still, "flow"))
    assert len(list(preprocess(still[:1], "flow"))) == 1


@pytest.mark.parametrize(
    ("vector", "colour"),
    [((1, 0), (255, 0, 0)), ((0, 1), (255, 230, 0)), ((-1, 0), (0, 209, 255)), ((0, -1), (88, 0, 255))],
    ids=["right", "down", "left", "up"],
)
def test_colours_are_those_of_the_wheel(vector: tuple[int, int], colour: tuple[int, int, int]) -> None:
    flow = np.zeros((1, 2, 2), np.float32)
    flow[0, 0] = vector
    drawn = flow_colours(flow)
    assert np.abs(drawn[0, 0].astype(int) - colour).max() <= 25 and drawn[0, 1].tolist() == [255] * 3


def test_frames_come_one_by_one() -> None:
    seen: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for index in range(100):
            seen.append(index)
            yield square(index % 50)

    drawn = preprocess(frames(), "grey")
    assert next(drawn).shape == (HEIGHT, WIDTH, 3) and len(seen) <= 1


def test_depth_of_a_network_in_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=8, neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.DepthAnythingForDepthEstimation(config)
    torch.nn.init.ones_(network.head.conv3.bias)  # above the final ReLU
    network.save_pretrained(tmp_path)
    transformers.DPTImageProcessor(
        size={"height": 28, "width": 28}, ensure_multiple_of=14, keep_aspect_ratio=False
    ).save_pretrained(tmp_path)
    drawn = list(preprocess([square(20), square(60)], "depth", Options(model=tmp_path)))
    assert [frame.shape for frame in drawn] == [(HEIGHT, WIDTH, 3)] * 2
    assert all(frame.min() == 0 and frame.max() == 255 for frame in drawn)


@pytest.mark.parametrize("task", ["canny", "scribble", "flow", "pose"])
def test_missing_package_is_named_with_what_installs_it(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cv2", "rtmlib"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"task '{task}' needs it: pip install .*\[control\]'"):
        preprocess([square(0)], task)


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("sketch", Options(), "known: grey, canny"),
        ("grey", Options(model="x"), "task 'grey' reads none"),
        ("grey", Options(thresholds=(1, 2)), "thresholds are for canny and scribble; task 'grey' reads none"),
        ("depth", Options(), "needs model: a folder"),
        ("depth", Options(model="nowhere/at-all"), "no depth model was found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_task_or_option_is_refused_before_a_frame_is_read(
    task: str, options: Options, says: str
) -> None:
    with pytest.raises(ArgumentError, match=says):
        preprocess([], task, options)
    assert "sketch" not in TASKS


@pytest.mark.parametrize("wrong", [(2, 1), (-1, 5), (0, 0), (float("nan"), 5), (1, float("inf"))])
def test_thresholds_that_cannot_be_are_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match="give a lower and an upper one"):
        Options(thresholds=wrong)

"""From a dataset to clips: which frames, which bucket, and every file that is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffsynth.cli.app import app
from diffsynth.errors import ArgumentError
from diffsynth.training.dataset.clips import DatasetPlan
from diffsynth.training.dataset.config import DatasetConfig, v1_dataset
from diffsynth.training.dataset.planning import log_plan, plan_dataset
from tests.pictures import write_odd
from tests.unit.training.dataset.conftest import Dataset

SIZE = ((48, 64),)


def plan(path: Path, **given: object) -> DatasetPlan:
    told = {"num_frames": (5,), "sizes": SIZE, **given}
    return plan_dataset([DatasetConfig(path=str(path), **told)], model_fps=16)  # type: ignore[arg-type]


def test_v1_takes_the_first_frames_and_says_what_it_leaves(dataset: Dataset) -> None:
    root = dataset("fast.mp4", "tall.mp4", "still.png")
    made = plan_dataset([v1_dataset(str(root), num_frames=9, height=48, width=64)], model_fps=16)
    assert [clip.indices for clip in made.clips] == [tuple(range(9)), tuple(range(9)), (0,)]
    assert made.buckets == {(1, 48, 64): 1, (9, 48, 64): 2}
    assert [str(note) for note in made.notes] == [
        "fast.mp4: 21 of 30 frames unused",
        "tall.mp4: 44% of its height cut off; enlarged 1.33x to 64x48",
    ]
    assert made.dropped == () and made.lists == ()


def test_a_clip_is_brought_to_the_rate_of_the_model(dataset: Dataset) -> None:
    (clip,) = plan(dataset("fast.mp4")).clips
    assert clip.indices == (0, 2, 4, 6, 8)
    (clip,) = plan(dataset("fast.mp4"), fps=30.0).clips
    assert clip.indices == (0, 1, 2, 3, 4)


def test_a_slow_video_repeats_frames_and_says_so(dataset: Dataset) -> None:
    made = plan(dataset("slow.webm"))
    assert made.clips[0].indices == (0, 1, 1, 2, 2)
    assert "8 fps is slower than 16: frames are repeated" in str(made.notes[0])


def test_unusable_files_are_dropped_with_reasons_and_listed(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    root = dataset("long.mp4", "short.mp4", "cut.mp4", "broken.mp4", "gone.mp4")
    made = plan(root)
    reasons = {dropped.media.name: dropped.reason for dropped in made.dropped}
    assert [clip.item.name for clip in made.clips] == ["long.mp4"]
    assert reasons["short.mp4"] == "too short: 4 frames, the shortest clip takes 5"
    assert "is not a video that can be read" in reasons["broken.mp4"] and "gone.mp4" in reasons
    assert reasons["cut.mp4"]
    assert made.lists == (root / "diffsynth_dropped.txt",)
    log_plan(made)
    assert "short.mp4 is not used: too short" in caplog.text
    listed = made.lists[0].read_text().splitlines()
    assert [line.split("\t") for line in listed] == [[str(d.media), d.reason] for d in made.dropped]
    with pytest.raises(ArgumentError, match=r"4 of 5 files cannot be used, and strict(.|\n)*1 more in"):
        plan(root, strict=True)
    dataset("long.mp4")
    assert plan(root).dropped == () and made.lists[0].read_text() == "", "an old list does not stay true"


def test_datasets_that_share_a_list_are_all_on_it(dataset: Dataset, tmp_path: Path) -> None:
    root = dataset("long.mp4", "short.mp4")
    config = DatasetConfig(path=str(root), num_frames=(5,), sizes=((48, 64),))
    pictures = replace(config, num_frames=(1,))
    both = plan_dataset([config, pictures], model_fps=16.0, list_folder=tmp_path / "lists")
    assert len(both.dropped) == 1 and len(both.lists) == 1
    assert "short.mp4" in both.lists[0].read_text()


def test_a_video_too_short_at_the_rate_of_the_model_says_both_lengths(dataset: Dataset) -> None:
    with pytest.raises(
        ArgumentError, match=r"none of 1 files.*\n.*30 frames at 30 fps are 16 at 16 fps.* takes 17"
    ):
        plan(dataset("fast.mp4"), num_frames=(17,))


def test_missing_captions_are_one_line_and_a_file(dataset: Dataset) -> None:
    root = dataset("long.mp4", ("fast.mp4", ""), ("tall.mp4", " "))
    with pytest.raises(
        ArgumentError, match=r"2 of 3 files have no caption, the first is metadata.csv line 3"
    ) as told:
        plan(root)
    assert "\n" not in str(told.value)
    listed = (root / "diffsynth_captions_missing.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["metadata.csv line 3", "metadata.csv line 4"]
    assert len(plan(root, missing_captions="drop").clips) == 1
    empty = plan(root, missing_captions="empty")
    assert [clip.item.caption for clip in empty.clips] == ["words of long.mp4", "", ""]


def test_several_windows_flips_and_repeats(dataset: Dataset) -> None:
    root = dataset("long.mp4", "still.png")
    made = plan(root, clip="windows", windows=0, flip=True, repeats=2.0)
    assert [(clip.indices[0], clip.flip) for clip in made.clips if len(clip.indices) == 5] == [
        (start, flip) for start in range(0, 30, 5) for flip in (False, True)
    ]
    assert made.buckets == {(1, 48, 64): 4, (5, 48, 64): 24}
    assert str(made.notes[0]) == "long.mp4: 1 of 31 frames unused"
    assert len({clip.stem for clip in made.clips}) == len(made.clips)


def test_a_broken_number_of_repeats_shows_a_share_once_more(dataset: Dataset) -> None:
    root = dataset("long.mp4")
    made = plan(root, num_frames=(1,), clip="windows", windows=0, repeats=1.5)
    assert {clip.repeats for clip in made.clips} == {1, 2}
    assert 31 < sum(made.buckets.values()) < 62
    fewer = plan(root, num_frames=(1,), clip="windows", windows=0, repeats=0.5)
    assert 0 < len(fewer.clips) < 31


def test_duration_and_shape_choose_the_bucket(dataset: Dataset) -> None:
    made = plan(dataset("long.mp4", "tall.mp4"), num_frames=(5, 17), sizes=((48, 64), (64, 48)))
    assert made.buckets == {(5, 64, 48): 1, (17, 48, 64): 1}


def test_two_datasets_keep_their_settings_and_their_stems(dataset: Dataset, media: Path) -> None:
    root = dataset("long.mp4")
    base = {"path": str(root), "num_frames": (5,), "sizes": SIZE}
    made = plan_dataset(
        [
            DatasetConfig(**base),
            DatasetConfig(**base, name="b", weight=2.0, caption_dropout=0.1, trigger="zorp"),
        ],
        model_fps=16,
    )
    first, second = made.clips
    assert (first.dataset, first.weight, first.caption_dropout) == ("data", 1.0, 0.0)
    assert (second.dataset, second.weight, second.caption_dropout) == ("b", 2.0, 0.1)
    assert second.item.caption == "zorp words of long.mp4"
    assert first.stem != second.stem and first.transform() == second.transform()


def test_inputs_that_are_videos_take_the_matching_frames(dataset: Dataset) -> None:
    header = ("video", "text", "control_video", "vace_video_mask")
    root = dataset(("fast.mp4", "a", "long.mp4", "still.png"), header=header)
    (clip,) = plan(root).clips
    assert clip.indices == (0, 2, 4, 6, 8), "30 fps"
    assert clip.input_indices == {"control_video": (0, 1, 2, 3, 4), "vace_video_mask": (0,) * 5}, "16 fps"
    assert clip.transform() == {
        "frames": "0-8/2", "height": 48, "width": 64, "resize": "cover", "flip": 0,
        "frames of control_video": "0-4", "frames of vace_video_mask": "0x5",
    }  # fmt: skip


def test_an_input_that_ends_early_drops_its_clip(dataset: Dataset) -> None:
    root = dataset(("long.mp4", "a", "short.mp4"), header=("video", "text", "control_video"))
    with pytest.raises(
        ArgumentError, match=r"its control_video short.mp4 ends at 0.19 s .* the clip at 1.00 s"
    ):
        plan(root, num_frames=(17,))


def test_an_image_input_that_is_a_video_is_a_reason(dataset: Dataset) -> None:
    root = dataset(("long.mp4", "a", "short.mp4"), header=("video", "text", "input_image"))
    with pytest.raises(ArgumentError, match=r"its input_image short\.mp4 is no picture"):
        plan(root)


def test_decoding_finds_damage_behind_a_good_header(dataset: Dataset) -> None:
    root = dataset("long.mp4", "still.png")
    file = root / "train" / "still.png"
    file.write_bytes(file.read_bytes()[:100])  # of 169; the size is told in the first
    assert len(plan(root).clips) == 2
    made = plan_dataset(
        [DatasetConfig(path=str(root), num_frames=(5,), sizes=SIZE)], model_fps=16, decode=True
    )
    assert [clip.item.name for clip in made.clips] == ["long.mp4"]
    assert "cannot be read as a picture" in made.dropped[0].reason


def test_odd_files_are_one_line_of_a_dataset_and_not_one_of_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, options in enumerate(["sar=4/3"] * 5 + ["interlaced=1"] * 2 + ["transfer=smpte2084"]):
        write_odd(tmp_path / f"{number}.mp4", options)
        (tmp_path / f"{number}.txt").write_text("a ball")
    log_plan(plan(tmp_path))
    lines = [record for record in caplog.records if "files (" in record.getMessage()]
    assert [record.levelname for record in lines] == ["WARNING", "WARNING"], "what is mended is no warning"
    assert "1 files (7.mp4) are HDR" in caplog.text and "2 files (5.mp4, 6.mp4) are interlaced" in caplog.text
    told = [str(note) for note in plan(tmp_path).notes if "not square" in str(note)]
    assert told == [
        f"{tmp_path.name}: 5 files (0.mp4, 1.mp4, 2.mp4, ...) have pixels that are not square: they get the "
        "proportions that players show"
    ]
    shown = CliRunner().invoke(
        app, ["dataset", "check", str(tmp_path), "--num-frames", "5", "--size", "48x64"]
    )
    assert shown.exit_code == 0, shown.output
    assert all(kind in shown.output for kind in ("not square", "are HDR", "are interlaced"))

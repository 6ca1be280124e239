"""Sizes: on the grid, nearest in shape, one for each resolution; small buckets are named."""

from __future__ import annotations

import pytest

from diffsynth.errors import ArgumentError
from diffsynth.training.dataset.buckets import choose_size, size_groups, small_buckets
from diffsynth.training.dataset.config import DatasetConfig, v1_dataset


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_frames": (147,)}, "147 -> 145 or 149"),
        ({"num_frames": (0,)}, "num_frames is 0"),
        ({"num_frames": (5, 5)}, "twice"),
        ({"sizes": ()}, "one bucket or more"),
        ({"sizes": ([480, 832],)}, "such as .480, 832."),
        ({"num_frames": 81}, "give a tuple"),
        ({"aspects": ("wide",)}, "width:height"),
        ({"clip": "last"}, "known: first, middle"),
        ({"windows": 3}, "one clip of each video"),
        ({"fps": "fast"}, "'native'"),
        ({"fps": 0.0}, "above 0"),
        ({"caption_dropout": 1.5}, "0 to 1"),
        ({"own_batch_size": -1}, "own_batch_size is -1"),
        ({"from_step": 5, "until_step": 5}, "above from_step"),
        ({"num_frames": (1,), "moments": True}, "5 frames or more"),
        ({"repeats": 0.0}, "above 0"),
        ({"weight": float("nan")}, "above 0"),
        ({"resolutions": "each"}, "several areas"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_is_checked_in_words(given: dict[str, object], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        DatasetConfig(path="a", **given)  # type: ignore[arg-type]


def test_v1_takes_the_first_frames_at_the_files_rate() -> None:
    config = v1_dataset("a")
    assert (config.clip, config.fps, config.num_frames, config.sizes) == (
        "first",
        "native",
        (81,),
        ((480, 832),),
    )
    assert (config.resize, config.flip, config.caption_dropout) == ("cover", False, 0.0)


def test_a_size_off_the_grid_names_the_nearest() -> None:
    config = DatasetConfig(path="a", sizes=((480, 840),))
    with pytest.raises(ArgumentError, match=r"width 840 .* multiple of 16, .* give 832 or 848"):
        size_groups(config, (16, 16))


def test_aspects_keep_the_area() -> None:
    config = DatasetConfig(path="a", sizes=((480, 832),), aspects=("1:1", "9:16"))
    assert size_groups(config, (16, 16)) == (((480, 832), (624, 624), (848, 480)),)
    assert size_groups(config, (32, 32)) == (((480, 832), (640, 640), (832, 480)),)


def test_each_resolution_is_a_group_of_sizes_of_one_area() -> None:
    sizes = ((480, 832), (720, 1280), (832, 480))
    assert len(size_groups(DatasetConfig(path="a", sizes=sizes), (16, 16))) == 1
    each = DatasetConfig(path="a", sizes=sizes, resolutions="each")
    assert size_groups(each, (16, 16)) == (((480, 832), (832, 480)), ((720, 1280),))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((1080, 1920), (720, 1280)),
        ((480, 854), (480, 832)),  # 720 lines would enlarge it
        ((1920, 1080), (832, 480)),
        ((100, 177), (480, 832)),  # enlarged as little as can be
    ],
)
def test_the_nearest_shape_wins_and_then_the_largest_that_enlarges_nothing(
    source: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert choose_size(((480, 832), (720, 1280), (832, 480)), *source) == expected


def test_small_buckets_are_named_and_filled_up() -> None:
    buckets = {(81, 480, 832): 3, (49, 480, 832): 4}
    (small,) = small_buckets(buckets, batch=2, accumulation=2)
    assert "81 frames of 832x480 holds 3 clips and a step takes 4" in str(small)
    assert "repeating its clips (1 more); none is dropped" in str(small)
    assert len(small_buckets(buckets, batch=2, accumulation=2, devices=2)) == 2
    with pytest.raises(ArgumentError, match="batch is 0"):
        small_buckets(buckets, batch=0)

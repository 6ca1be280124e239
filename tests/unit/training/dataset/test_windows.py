"""Rate first, then windows: exact frame numbers."""

from __future__ import annotations

import pytest

from diffsynth.training.dataset.clips import shown_indices
from diffsynth.training.dataset.windows import longest, resampled, starts
from diffsynth.video.probing import MediaFacts


def facts(num_frames: int, fps: float | None, times_s: tuple[float, ...] | None = None) -> MediaFacts:
    return MediaFacts(height=8, width=8, num_frames=num_frames, fps=fps, times_s=times_s, is_picture=False)


@pytest.mark.parametrize("fps", [None, 16.0, 16.02], ids=["native", "equal", "nearly-equal"])
def test_every_frame_is_taken_at_the_files_own_rate(fps: float | None) -> None:
    assert resampled(facts(31, 16.0), fps) == tuple(range(31))


def test_a_faster_file_is_thinned_to_the_nearest_frames() -> None:
    # 30 / 16 = 1.875 frames of the file per frame: 0, 1.875, 3.75, 5.625, 7.5, 9.375
    assert resampled(facts(10, 30.0), 16.0) == (0, 2, 4, 6, 8)
    assert resampled(facts(161, 32.0), 16.0) == tuple(range(0, 161, 2)), "the last frame is not lost"


def test_a_slower_file_repeats_frames() -> None:
    assert resampled(facts(3, 8.0), 16.0) == (0, 1, 1, 2, 2)


def test_uneven_frames_are_chosen_by_their_time() -> None:
    assert resampled(facts(4, 4.0, (0.0, 0.1, 0.9, 1.0)), 10.0) == (0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3)


def test_a_file_without_a_rate_gives_every_frame() -> None:
    assert resampled(facts(3, None), 16.0) == (0, 1, 2)


def test_a_video_goes_to_the_longest_bucket_that_it_fills() -> None:
    assert [longest(length, (5, 17, 81)) for length in (4, 5, 80, 81)] == [None, 5, 17, 81]


@pytest.mark.parametrize(
    ("policy", "windows", "expected"),
    [
        ("first", 1, [0]),
        ("middle", 1, [13]),
        ("uniform", 1, [13]),
        ("uniform", 3, [0, 13, 26]),
        ("windows", 0, [0, 5, 10, 15, 20, 25]),
        ("windows", 2, [0, 5]),
    ],
)
def test_policies(policy: str, windows: int, expected: list[int]) -> None:
    assert starts(31, 5, policy, windows=windows, seed=0, name="a") == expected


def test_windows_that_fall_together_are_one() -> None:
    assert starts(6, 5, "uniform", windows=9, seed=0, name="a") == [0, 1]


def test_random_starts_depend_on_seed_and_file_alone() -> None:
    def drawn(seed: int, name: str) -> list[int]:
        return starts(1000, 5, "random", windows=4, seed=seed, name=name)

    assert drawn(0, "a.mp4") == drawn(0, "a.mp4")
    assert drawn(0, "a.mp4") != drawn(1, "a.mp4") != drawn(1, "b.mp4")
    every = {
        start
        for number in range(300)
        for start in starts(7, 5, "random", windows=1, seed=0, name=f"{number}")
    }
    assert every == {0, 1, 2}, "first and last places are drawn too"


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ((0,), "0"),
        ((0, 1, 2, 3), "0-3"),
        ((0, 2, 4), "0-4/2"),
        ((0, 2, 4, 5, 6, 7), "0-4/2,5-7"),
        ((3, 3, 3, 3), "3x4"),
        ((0, 1, 1, 2, 2), "0,1,1,2,2"),
    ],
)
def test_frame_numbers_are_written_without_loss(indices: tuple[int, ...], text: str) -> None:
    assert shown_indices(indices) == text

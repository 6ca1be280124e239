from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from diffsynth.errors import ArgumentError
from diffsynth.training.batches import Batches, StepSampler


class Toys:
    """Samples of two buckets: "a" with 5, "b" with 2."""

    def __init__(
        self,
        repeats: Sequence[float] = (1.0,) * 7,
        dropout: float = 0.0,
        steps: Sequence[tuple[int, int]] = ((0, 0),) * 7,
        moments: Sequence[int] = (),
        sizes: Sequence[int] = (0,) * 7,
    ) -> None:
        self._repeats, self._dropout, self._steps, self._moments = repeats, dropout, steps, moments
        self._sizes = sizes

    def __len__(self) -> int:
        return 7

    def bucket(self, index: int) -> str:
        return "a" if index < 5 else "b"

    def sample_id(self, index: int) -> str:
        return f"sample {index}"

    def name(self, index: int) -> str:
        return f"{index}.safetensors"

    def source(self, index: int) -> int:
        return index

    def repeats(self, index: int) -> float:
        return self._repeats[index]

    def weight(self, index: int) -> float:
        return 1.0 + index

    def caption_dropout(self, index: int) -> float:
        return self._dropout

    def batch_size(self, index: int) -> int:
        return self._sizes[index]

    def steps(self, index: int) -> tuple[int, int]:
        return self._steps[index]

    def is_moments(self, index: int) -> bool:
        return index in self._moments


def indices(batches: Batches, step: int) -> list[int]:
    return [pick.index for pick in batches.at(step)]


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    asked = Batches(Toys(), size=2, seed=3)
    for step in range(20):
        asked.at(step)
    assert Batches(Toys(), size=2, seed=3).at(17) == asked.at(17)
    assert [indices(asked, s) for s in range(12)] != [
        indices(Batches(Toys(), size=2, seed=4), s) for s in range(12)
    ]


def test_a_step_holds_samples_of_one_bucket_and_an_epoch_holds_all() -> None:
    toys = Toys()
    batches = Batches(toys, size=2, seed=0)
    assert batches.epoch_of(3) == 0 and batches.epoch_of(4) == 1
    for epoch in range(3):
        steps = [indices(batches, 4 * epoch + i) for i in range(4)]
        assert all(len({toys.bucket(i) for i in step}) == 1 and len(step) == 2 for step in steps)
        assert {i for step in steps for i in step} == set(range(7))
        assert batches.epoch_of(4 * epoch + 3) == epoch


def test_a_bucket_that_does_not_fill_a_step_is_filled_up_and_told() -> None:
    batches = Batches(Toys(), size=8, seed=0)
    assert batches.notes == [
        "bucket a: 5 samples per epoch, filled up to 8 (1 steps of 8) by repeating some",
        "bucket b: 2 samples per epoch, filled up to 8 (1 steps of 8) by repeating some",
    ]
    for step in range(2):
        picks = batches.at(step)
        assert len(picks) == 8
        # the same sample twice in a step is not the same noise twice
        assert len({pick.draw_id for pick in picks}) == 8


def test_repeats_are_kept_on_average_also_where_they_are_no_whole_number() -> None:
    batches = Batches(Toys(repeats=(2, 1, 1, 0.5, 0.5, 1, 1)), size=1, seed=0)
    epochs = 40
    seen = Counter(i for s in range(epochs * 7) for i in indices(batches, s))
    assert batches.epoch_of(6) == 0 and batches.epoch_of(7) == 1
    assert [seen[i] for i in (0, 1, 2, 5, 6)] == [2 * epochs, epochs, epochs, epochs, epochs]
    assert seen[3] + seen[4] == epochs and 10 <= seen[3] <= 30


def test_ranks_and_passes_take_slices_of_one_step() -> None:
    batches = Batches(Toys(), size=4, seed=0)

    def passes(rank: int) -> list[list[int]]:
        sampler = StepSampler(batches, start=2, stop=5, accumulate=2, rank=rank, world=2)
        assert len(sampler) == 6
        return [[pick.index for pick in picks] for picks in sampler]

    for step in range(3):
        first, second = passes(0), passes(1)
        mixed = [one for i in (2 * step, 2 * step + 1) for one in (*first[i], *second[i])]
        assert mixed == indices(batches, step + 2)


def test_captions_are_dropped_as_often_as_asked_by_step_and_sample_alone() -> None:
    batches = Batches(Toys(dropout=0.3), size=2, seed=0)
    picks = [pick for step in range(500) for pick in batches.at(step)]
    share = sum(pick.drops_caption for pick in picks) / len(picks)
    assert share == pytest.approx(0.3, abs=0.06)  # four deviations of 1000 draws
    assert {pick.weight for pick in picks} == {1.0 + i for i in range(7)}


def test_no_sample_and_impossible_repeats_are_named() -> None:
    with pytest.raises(ArgumentError, match="no sample to train on"):
        Batches(Toys(), size=1, seed=0, indices=[])
    with pytest.raises(ArgumentError, match="sample 2 has repeats 0"):
        Batches(Toys(repeats=(1, 1, 0, 1, 1, 1, 1)), size=1, seed=0)


def test_samples_are_seen_in_their_part_of_the_run_alone() -> None:
    late, early, always = (6, 0), (0, 6), (0, 0)
    toys = Toys(steps=(early, early, always, late, late, late, late))
    batches = Batches(toys, size=1, seed=0, num_steps=30)
    seen = [{i for step in steps for i in indices(batches, step)} for steps in (range(6), range(6, 30))]
    assert seen == [{0, 1, 2}, {2, 3, 4, 5, 6}]
    # epochs are counted through: two of three samples, then such of five
    assert [batches.epoch_of(step) for step in (0, 2, 3, 5, 6, 10, 11)] == [0, 0, 1, 1, 2, 2, 3]
    asked_first = Batches(toys, size=1, seed=0, num_steps=30)
    assert asked_first.at(17) == batches.at(17)


def test_a_step_that_nothing_is_seen_at_is_refused_unless_the_run_ends_before() -> None:
    toys = Toys(steps=((0, 5),) * 7)
    with pytest.raises(ArgumentError, match="No dataset is seen at step 6"):
        Batches(toys, size=1, seed=0, num_steps=6)
    assert len(Batches(toys, size=1, seed=0, num_steps=5).at(4)) == 1


def test_which_moment_is_seen_depends_on_seed_step_and_sample_alone() -> None:
    batches = Batches(Toys(moments=(0, 1, 2, 3, 4)), size=2, seed=0)
    picks = [pick for step in range(400) for pick in batches.at(step)]
    assert all((pick.moment is None) == (pick.index > 4) for pick in picks)
    places = [pick.moment for pick in picks if pick.moment is not None]
    assert 0 <= min(places) < 0.02 and 0.98 < max(places) < 1
    assert Batches(Toys(moments=(0, 1, 2, 3, 4)), size=2, seed=0).at(399) == batches.at(399)


def test_samples_may_have_a_batch_size_of_their_own_shared_by_ranks_and_passes() -> None:
    toys = Toys(sizes=(0, 0, 0, 2, 2, 0, 0))
    batches = Batches(toys, size=2, passes=2, seed=0)
    steps = [indices(batches, step) for step in range(4)]  # of 0-2: two steps of 2; of 3-4 and 5-6: one each
    assert sorted(len(step) for step in steps) == [2, 2, 2, 4]
    assert all(set(step) <= {3, 4} for step in steps if len(step) == 4)
    both = [StepSampler(batches, start=0, stop=4, rank=rank, world=2) for rank in range(2)]
    for step, first, second in zip(range(4), *both, strict=True):
        assert len(first) == len(second) == len(steps[step]) // 2
        assert [pick.index for pick in (*first, *second)] == steps[step]

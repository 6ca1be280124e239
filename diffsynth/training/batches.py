"""Which samples a step sees: a function of (seed, step), so that a run may stop and go on anywhere.

A step's samples all come from one bucket (one shape of latents, one batch size), and there are
``batch_size x accumulate x ranks`` of them. An epoch visits every sample as often as its repeats say; which
samples a fraction falls to changes from epoch to epoch. The last step of a bucket is filled up by repeating
some of its samples; nothing is dropped.

Samples may be for a part of the run alone. Where the samples that take part change, a new stage begins, and
in it a new epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Protocol

import torch
from torch.utils.data import Sampler

from diffsynth.errors import ArgumentError


class Samples(Protocol):
    """What the batches need to know of the cached samples; no tensor is read for it."""

    def __len__(self) -> int: ...

    def bucket(self, index: int) -> Hashable:
        """Samples of one bucket can stand in one batch."""

    def sample_id(self, index: int) -> str:
        """Stays the same wherever and in whatever order the samples lie."""

    def name(self, index: int) -> str:
        """Of its file, for people."""

    def source(self, index: int) -> Hashable:
        """The file that it was made of; a file may give several samples."""

    def repeats(self, index: int) -> float:
        """How often the sample is seen per epoch."""

    def weight(self, index: int) -> float:
        """Of its loss."""

    def caption_dropout(self, index: int) -> float:
        """Share of the steps in which it goes without its caption."""

    def batch_size(self, index: int) -> int:
        """Samples of one pass of one rank, where the sample wants a number of its own; 0: the run's."""

    def steps(self, index: int) -> tuple[int, int]:
        """The first step that sees the sample, and the first that does not any more; 0: to the end."""

    def is_moments(self, index: int) -> bool:
        """Whether each step sees one later latent of it alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """One sample at one step."""

    index: int  # in the dataset
    sample_id: str
    step: int
    draw_id: str  # seeds noise and sigma: the sample's id, with a number where a step holds it again
    drops_caption: bool
    weight: float = 1.0  # of its loss
    moment: float | None = None  # which latent of it is seen alone, 0 to 1; None: all


def chance(*parts: object) -> float:
    """A number in [0, 1) that depends on ``parts`` alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


class Batches:
    """See this module's legend.

    Args:
        samples: those that are trained on.
        size: samples of a step, over all ranks and accumulated passes.
        passes: of a step, over all ranks; for samples with a batch size of their own.
        seed: of the order.
        num_steps: of the run; None: not known, and the samples of all stages are looked at.
        indices: which of ``samples`` take part; None: all.
        epoch_steps: what `epoch_of` counts by; 0: until every sample was seen as often as its repeats say.
            Nothing that is drawn depends on it.

    Raises:
        ArgumentError: when there are none, at some step, or repeats are no positive number.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        size: int,
        passes: int = 1,
        seed: int,
        num_steps: int | None = None,
        indices: Sequence[int] | None = None,
        epoch_steps: int = 0,
    ) -> None:
        chosen = range(len(samples)) if indices is None else indices
        if not chosen:
            raise ArgumentError("There is no sample to train on; look at `diffsynth dataset check`.")
        self.samples, self.seed, self._epoch_steps = samples, seed, epoch_steps
        sizes = {index: samples.batch_size(index) * passes or size for index in chosen}
        ordered = sorted(chosen, key=samples.sample_id)
        self._stages: list[_Stage] = []
        for start in _starts([samples.steps(index) for index in ordered], num_steps):
            members = [i for i in ordered if _sees(samples.steps(i), start)]
            if not members:
                raise ArgumentError(
                    f"No dataset is seen at step {start + 1}; give one another from_step or until_step."
                )
            before = self._stages[-1].epoch_of(start - 1) + 1 if self._stages else 0
            self._stages.append(_Stage(samples, members, sizes, seed, start=start, epoch=before))

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self._epoch_steps if self._epoch_steps else self._stage(step).epoch_of(step)

    @property
    def notes(self) -> list[str]:
        """A line for each bucket whose last step is filled up by repeating samples, each once."""
        return list(dict.fromkeys(note for stage in self._stages for note in stage.notes))

    def at(self, step: int) -> tuple[Pick, ...]:
        """The samples of a step, in an order that does not depend on the number of ranks."""
        seen: dict[int, int] = {}
        return tuple(self._pick(index, step, seen) for index in self._stage(step).at(step))

    def _stage(self, step: int) -> _Stage:
        return [stage for stage in self._stages if stage.start <= step][-1]

    def _pick(self, index: int, step: int, seen: dict[int, int]) -> Pick:
        """A sample at a step; ``seen`` counts those before it."""
        samples, name = self.samples, self.samples.sample_id(index)
        seen[index] = seen.get(index, 0) + 1
        draw = name if seen[index] == 1 else f"{name}#{seen[index]}"
        drops = chance(self.seed, step, draw, "caption") < samples.caption_dropout(index)
        moment = chance(self.seed, step, draw, "moment") if samples.is_moments(index) else None
        return Pick(
            index=index, sample_id=name, step=step, draw_id=draw, drops_caption=drops,
            weight=samples.weight(index), moment=moment,
        )  # fmt: skip


class _Stage:
    """Steps that see the same samples: epoch after epoch of them.

    Args:
        samples: all.
        members: indices of those of the stage, in the order of their ids.
        sizes: of each member, samples of its steps.
        seed: of the order.
        start: the first step.
        epoch: number of the first epoch.
    """

    def __init__(
        self, samples: Samples, members: Sequence[int], sizes: Mapping[int, int], seed: int, *, start: int,
        epoch: int,
    ) -> None:  # fmt: skip
        self.samples, self.seed, self.start, self._epoch = samples, seed, start, epoch
        by_bucket: dict[tuple[Hashable, int], list[int]] = {}
        for index in members:
            by_bucket.setdefault((samples.bucket(index), sizes[index]), []).append(index)
        keys = sorted(by_bucket, key=lambda key: (str(key[0]), key[1]))
        self._buckets = [by_bucket[key] for key in keys]
        self._names, self._sizes = [str(bucket) for bucket, _ in keys], [size for _, size in keys]
        self._slots = [_num_slots(samples, bucket) for bucket in self._buckets]
        self._steps = [ceil(slots / size) for slots, size in zip(self._slots, self._sizes, strict=True)]
        # One entry per epoch is enough; workers and the training loop may stand at two.
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)
        self._picked = lru_cache(maxsize=2 * len(self._buckets))(self._slots_of_epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch of a step of the run."""
        return self._epoch + (step - self.start) // sum(self._steps)

    @property
    def notes(self) -> list[str]:
        """Buckets that are filled up."""
        return [
            f"bucket {name}: {slots} samples per epoch, filled up to {steps * size} "
            f"({steps} steps of {size}) by repeating some"
            for name, slots, steps, size in zip(
                self._names, self._slots, self._steps, self._sizes, strict=True
            )
            if steps * size != slots
        ]

    def at(self, step: int) -> list[int]:
        """Indices of the samples of a step of the run."""
        epoch = self.epoch_of(step)
        bucket, number = self._order(epoch)[(step - self.start) % sum(self._steps)]
        size = self._sizes[bucket]
        return self._picked(epoch, bucket)[number * size : (number + 1) * size]

    def _order_of_epoch(self, epoch: int) -> list[tuple[int, int]]:
        steps = [(bucket, number) for bucket, count in enumerate(self._steps) for number in range(count)]
        return [steps[i] for i in _shuffle(len(steps), self.seed, epoch, "steps")]

    def _slots_of_epoch(self, epoch: int, bucket: int) -> list[int]:
        """Sample indices of a bucket in an epoch, shuffled and filled up to whole steps."""
        members, count = self._buckets[bucket], self._slots[bucket]
        repeats = [self.samples.repeats(index) for index in members]
        # Systematic sampling: each sample gets the whole part of its repeats, and one more by turns.
        stride, offset = sum(repeats) / count, chance(self.seed, epoch, bucket, "repeats")
        ends, slots, reached = 0.0, list[int](), 0
        for index, times in zip(members, repeats, strict=True):
            ends += times
            upto = min(count, ceil(ends / stride - offset - 1e-9))
            slots += [index] * (upto - reached)
            reached = max(reached, upto)
        slots += [members[-1]] * (count - len(slots))
        slots = [slots[i] for i in _shuffle(count, self.seed, epoch, f"bucket {bucket}")]
        total = self._steps[bucket] * self._sizes[bucket]
        return (slots * ceil(total / count))[:total]


class StepSampler(Sampler[list[Pick]]):
    """One list of samples per pass of one rank, from a step to another.

    Args:
        batches: say what a step sees.
        start: the first step.
        stop: the step after the last.
        accumulate: passes of a step.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        start: int,
        stop: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._batches, self._start, self._stop = batches, start, stop
        self._accumulate, self._rank, self._world = accumulate, rank, world

    def __len__(self) -> int:
        return max(0, self._stop - self._start) * self._accumulate

    def __iter__(self) -> Iterator[list[Pick]]:
        for step in range(self._start, self._stop):
            picks = self._batches.at(step)
            batch_size, rest = divmod(len(picks), self._accumulate * self._world)
            assert not rest
            for number in range(self._accumulate):
                first = (number * self._world + self._rank) * batch_size
                yield list(picks[first : first + batch_size])


def _starts(steps: Sequence[tuple[int, int]], num_steps: int | None) -> list[int]:
    """Steps at which other samples are seen than before: 0, and where any begins or ends."""
    marks = {0} | {mark for one in set(steps) for mark in one}
    return sorted(mark for mark in marks if num_steps is None or mark < max(1, num_steps))


def _sees(steps: tuple[int, int], step: int) -> bool:
    first, end = steps
    return first <= step and (end == 0 or step < end)


def _num_slots(samples: Samples, bucket: Sequence[int]) -> int:
    for index in bucket:
        if not samples.repeats(index) > 0:
            raise ArgumentError(
                f"{samples.sample_id(index)} has repeats {samples.repeats(index)}; give a number above 0, or "
                "leave its dataset out."
            )
    return max(1, round(sum(samples.repeats(index) for index in bucket)))


def _shuffle(count: int, *parts: object) -> list[int]:
    generator = torch.Generator().manual_seed(int(chance(*parts) * 2**53))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order

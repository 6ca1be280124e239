"""Which size a clip is brought to, and buckets that hold less than a step takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffsynth.errors import ArgumentError
from diffsynth.training.dataset.clips import Bucket
from diffsynth.training.dataset.config import DatasetConfig, ratio_of

Size = tuple[int, int]  # height, width in pixels

_SAME_SHAPE = 0.05  # of the logarithm of width / height: 832x480 and 1280x720 differ by 0.026
_SAME_AREA = 1.25  # sizes whose areas differ by less are one resolution


def size_groups(config: DatasetConfig, grid: Size) -> tuple[tuple[Size, ...], ...]:
    """Return the sizes that a clip may be brought to; it gets one of each group.

    Args:
        config: of the dataset.
        grid: height and width that the model's sizes are multiples of, in pixels: VAE stride x patch.

    Raises:
        ArgumentError: for a size off the grid, with the nearest.
    """
    for size in config.sizes:
        _check_on_grid(size, grid)
    families = [
        (size, *(_with_ratio(size[0] * size[1], ratio_of(aspect), grid) for aspect in config.aspects))
        for size in config.sizes
    ]
    if config.resolutions == "one":
        return (tuple(dict.fromkeys(size for family in families for size in family)),)
    groups: list[list[Size]] = []
    areas: list[int] = []
    for family in sorted(families, key=lambda sizes: sizes[0][0] * sizes[0][1]):
        area = family[0][0] * family[0][1]
        if areas and area <= _SAME_AREA * areas[-1]:
            groups[-1] += family
        else:
            groups.append([*family])
            areas.append(area)
    return tuple(tuple(dict.fromkeys(group)) for group in groups)


def _check_on_grid(size: Size, grid: Size) -> None:
    for name, pixels, step in zip(("height", "width"), size, grid, strict=True):
        if pixels % step:
            below = pixels // step * step
            nearest = f"{below} or {below + step}" if below else str(step)
            raise ArgumentError(
                f"{name} {pixels} of size {size[0]}x{size[1]} (height x width) is no multiple of {step}, "
                f"which this model takes; give {nearest}."
            )


def _with_ratio(area: int, ratio: float, grid: Size) -> Size:
    """The size on the grid of about this area and width / height."""
    height = max(grid[0], round(math.sqrt(area / ratio) / grid[0]) * grid[0])
    width = max(grid[1], round(math.sqrt(area * ratio) / grid[1]) * grid[1])
    return height, width


def choose_size(group: Sequence[Size], height: int, width: int) -> Size:
    """Return the size whose proportions are nearest; of several, the largest that enlarges nothing.

    Args:
        group: sizes to choose from.
        height: of the source, in pixels.
        width: of the source.
    """

    def off(size: Size) -> float:
        return abs(math.log(size[1] / size[0]) - math.log(width / height))

    least = min(map(off, group))
    near = [size for size in group if off(size) <= least + _SAME_SHAPE]
    covered = [size for size in near if enlargement(size, height, width) <= 1.0]
    return max(covered, key=math.prod) if covered else min(near, key=math.prod)


def enlargement(size: Size, height: int, width: int) -> float:
    """How much a source is enlarged so that it covers ``size``; at most 1 when it is made smaller."""
    return max(size[0] / height, size[1] / width)


def cut_away(size: Size, height: int, width: int) -> float:
    """Share of the source that lies outside of the middle part with the proportions of ``size``."""
    ratio = (size[1] / size[0]) / (width / height)
    return 1.0 - min(ratio, 1.0 / ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallBucket:
    """A bucket that holds fewer clips than one step takes."""

    bucket: Bucket
    num_clips: int
    num_needed: int

    def __str__(self) -> str:
        return (
            f"bucket {bucket_name(self.bucket)} holds {self.num_clips} clips and a step takes "
            f"{self.num_needed} (batch x accumulation x devices): it is filled up by repeating its clips "
            f"({self.num_needed - self.num_clips} more); none is dropped. Fewer buckets, or a smaller batch, "
            "avoid it."
        )


def small_buckets(
    buckets: Mapping[Bucket, int], *, batch: int, accumulation: int = 1, devices: int = 1
) -> tuple[SmallBucket, ...]:
    """Name the buckets that are smaller than one step of the optimizer.

    Args:
        buckets: clips in each, as ``DatasetPlan.buckets``.
        batch: samples of one device at a time.
        accumulation: batches of one step.
        devices: that share a step.

    Raises:
        ArgumentError: for a number below 1.
    """
    for name, given in (("batch", batch), ("accumulation", accumulation), ("devices", devices)):
        if given < 1:
            raise ArgumentError(f"{name} is {given}; give 1 or more.")
    needed = batch * accumulation * devices
    return tuple(
        SmallBucket(bucket=bucket, num_clips=count, num_needed=needed)
        for bucket, count in buckets.items()
        if count < needed
    )


def bucket_name(bucket: Bucket) -> str:
    """As logs show it: frames, width x height."""
    return f"{bucket[0]} frames of {bucket[2]}x{bucket[1]}"

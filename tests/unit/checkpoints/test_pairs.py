"""A plan, a pipeline and training say the same of which file is which part."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from diffsynth.checkpoints.pairs import is_named, roles_of
from diffsynth.cli.plan import find_parts
from diffsynth.errors import AmbiguousModelError
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline

# names of two files as they are given, and which of them is the high-noise expert
PAIRS = [
    pytest.param(("a_high_noise", "b_low_noise"), 0, id="both-say"),
    pytest.param(("a_low_noise", "b_high_noise"), 1, id="the-other-way-round"),
    pytest.param(("a_low_noise", "b"), 1, id="the-first-says-low"),
    pytest.param(("a", "b_high_noise"), 1, id="the-second-says-high"),
    pytest.param(("a", "b_low_noise"), 0, id="the-second-says-low"),
    pytest.param(("a", "b"), 0, id="by-order"),
]


def two_dits(names: tuple[str, str], folder: Path) -> list[str]:
    files = [str(folder / f"{name}.safetensors") for name in names]
    for seed, file in enumerate(files):
        shutil.copy(toy_files("t2v", seed)[0], file)
    return files


@pytest.mark.parametrize(("names", "high"), PAIRS)
def test_plan_and_pipeline_agree_which_expert_is_which(
    names: tuple[str, str], high: int, tmp_path: Path
) -> None:
    files = two_dits(names, tmp_path)
    matches = find_parts(files).matches
    assert [match.checkpoint.source for match in (matches["dit"], matches["dit_low_noise"])] == [
        files[high], files[1 - high],
    ]  # fmt: skip
    pipe = WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")
    assert [pipe.parts.sources[part] for part in ("dit", "dit_low_noise")] == [files[high], files[1 - high]]


def test_two_files_that_say_the_same_are_no_pair_for_either(tmp_path: Path) -> None:
    files = two_dits(("a_low_noise", "b_low_noise"), tmp_path)
    with pytest.raises(AmbiguousModelError, match="are low-noise experts; give one of each"):
        find_parts(files)
    with pytest.raises(AmbiguousModelError, match="are low-noise experts; load one of each"):
        WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")


def test_a_network_is_named_by_its_file_or_a_folder_of_it(tmp_path: Path) -> None:
    files = two_dits(("a_high_noise", "b"), tmp_path)
    dit = find_parts(files[:1]).matches["dit"]
    assert is_named(dit, files[0]) and is_named(dit, tmp_path) and not is_named(dit, files[1])
    assert roles_of([dit, dit]) is None

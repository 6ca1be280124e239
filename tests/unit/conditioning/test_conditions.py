"""Each slot has one writer, whatever the order; plans pin and trim."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from diffsynth.conditioning.conditioner import read_inputs
from diffsynth.conditioning.conditions import Contribution, LatentPlan, merge
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.errors import ArgumentError

A, B = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
PLANE = torch.ones(1, 4, 2, 2, 2)


def test_sides_get_their_own_and_share_the_rest() -> None:
    merged = merge(
        {
            "text": Contribution(text=(A, B)),
            "image": Contribution(image=(A, None), planes={"mask": (PLANE, None)}),
            "speed": Contribution(adapters={"speed": ("fast", "still")}),
        }
    )
    assert merged.positive.text is A and merged.negative.text is B
    assert merged.positive.image is A and merged.negative.image is A
    assert merged.negative.planes == {"mask": PLANE}
    assert (merged.positive.adapters, merged.negative.adapters) == ({"speed": "fast"}, {"speed": "still"})


def test_no_negative_text_means_the_same() -> None:
    assert merge({"text": Contribution(text=(A, None))}).negative.text is A


def test_the_order_of_conditioners_changes_nothing() -> None:
    given = {
        "text": Contribution(text=(A, B)),
        "video": Contribution(latents=LatentPlan(start=PLANE)),
        "reference": Contribution(latents=LatentPlan(extra_frames=1), planes={"image": (PLANE, None)}),
    }
    for order in permutations(given):
        merged = merge({name: given[name] for name in order})
        assert merged.latents == LatentPlan(start=PLANE, extra_frames=1)
        assert merged.positive.text is A and set(merged.positive.planes) == {"image"}


@pytest.mark.parametrize(
    ("contribution", "slot"),
    [
        (Contribution(text=(A, None)), "text"),
        (Contribution(image=(A, None)), "image"),
        (Contribution(planes={"mask": (PLANE, None)}), "plane mask"),
        (Contribution(adapters={"vace": (1, None)}), "adapter vace"),
        (Contribution(latents=LatentPlan(start=PLANE)), "start"),
        (Contribution(latents=LatentPlan(pinned=PLANE)), "pinned"),
        (Contribution(latents=LatentPlan(extra_frames=1)), "extra_frames"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_writers_of_one_slot_are_both_named(contribution: Contribution, slot: str) -> None:
    with pytest.raises(ArgumentError, match=rf"first and second both .*{slot}"):
        merge({"first": contribution, "second": contribution})


def test_a_generation_needs_a_text() -> None:
    with pytest.raises(ArgumentError, match="No text condition"):
        merge({"video": Contribution(latents=LatentPlan(start=PLANE))})


def test_plans_pin_and_trim() -> None:
    latents = torch.randn(1, 4, 3, 2, 2)
    before = latents.clone()
    plan = LatentPlan(pinned=PLANE[:, :, :1], extra_frames=1)
    pinned = plan.pin(latents)
    assert torch.equal(pinned[:, :, :1], PLANE[:, :, :1]) and torch.equal(pinned[:, :, 1:], latents[:, :, 1:])
    assert torch.equal(latents, before), "a copy is pinned"
    assert torch.equal(plan.trim(latents), latents[:, :, 1:])
    assert LatentPlan().pin(latents) is latents and LatentPlan().num_pinned == 0


def test_every_conditioner_reads_only_its_own_arguments() -> None:
    given = {"prompt": "a", "denoising_strength": 0.5, "height": 16}
    read = {name: read_inputs(conditioner.Inputs, given) for name, conditioner in CONDITIONERS.items()}
    assert read["text"].prompt == "a" and read["video"].denoising_strength == 0.5
    assert all(not hasattr(inputs, "height") for inputs in read.values())

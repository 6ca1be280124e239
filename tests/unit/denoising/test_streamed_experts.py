"""What travels to the device for one step of guidance."""

from __future__ import annotations

import torch

from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Expert, Experts
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig
from diffsynth.vram_management.streaming import BlockStream
from tests.unit.denoising.asking import ask

# the proportions of the 14B model: width to feed-forward 1 to 2.7
CONFIG = DiTConfig(
    dim=128, in_dim=16, out_dim=16, ffn_dim=346, num_layers=8, num_heads=2, freq_dim=32, text_dim=32,
    text_len=16,
)  # fmt: skip
CPU = torch.device("cpu")


def bytes_of_steps(*, interleaves: bool, keeps_keys: bool, steps: int) -> tuple[list[int], torch.Tensor]:
    torch.manual_seed(0)
    dit = WanDiT(CONFIG).requires_grad_(False)
    stream = BlockStream(list(dit.blocks), device=CPU, host="pageable")
    dit.visit, dit.keeps_keys = stream, keeps_keys
    experts = Experts(Expert(dit=dit), interleaves=interleaves)
    sides = [Conditions(text=torch.randn(1, 5, 32)), Conditions(text=torch.randn(1, 3, 32))]
    latents, counted = torch.randn(1, 16, 1, 4, 4), []
    with torch.no_grad():
        for step in range(steps):
            before = stream.counts.bytes
            toward, away = ask(experts, latents, torch.tensor([900.0 - 100 * step]), sides)
            latents = latents - 0.1 * (away + 3 * (toward - away))
            counted.append(stream.counts.bytes - before)
    stream.close()
    return counted, latents


def test_both_sides_in_one_residency_with_kept_keys_halve_the_traffic_and_more() -> None:
    usual, expected = bytes_of_steps(interleaves=False, keeps_keys=False, steps=4)
    lean, made = bytes_of_steps(interleaves=True, keeps_keys=True, steps=4)
    assert usual[1] == usual[2] == usual[3]
    for step in (1, 2, 3):
        assert lean[step] <= 0.45 * usual[step]
    assert torch.equal(made, expected)


def test_kept_keys_pay_from_the_second_step_on_when_sides_take_turns() -> None:
    usual, expected = bytes_of_steps(interleaves=False, keeps_keys=False, steps=3)
    kept, made = bytes_of_steps(interleaves=False, keeps_keys=True, steps=3)
    assert kept[2] < 0.87 * usual[2]
    assert torch.equal(made, expected)

"""Times are embedded once each, whatever the number of tokens that follow them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig
from diffsynth.models.wan.stream import read_clocks
from diffsynth.ops.fused import spans_of

GRID_5B = (31, 22, 40)  # TI2V-5B at 1280 x 704 and 121 frames
TOKENS_5B = 27280


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    torch.manual_seed(0)
    return WanDiT(
        DiTConfig(
            dim=48, in_dim=48, out_dim=48, ffn_dim=64, num_layers=2, num_heads=2, freq_dim=32, text_dim=32,
            text_len=64,
        )
    ).requires_grad_(False)  # fmt: skip


def first_frame_clean(num_frames: int) -> Tensor:
    timestep = torch.full((1, num_frames), 702.25, dtype=torch.float64)
    timestep[:, 0] = 0.0
    return timestep


def test_a_pinned_frame_takes_100_times_less_than_times_by_token(dit: WanDiT) -> None:
    times, clock = read_clocks(first_frame_clean(GRID_5B[0]), GRID_5B)
    assert clock is not None and clock.shape == (TOKENS_5B,)
    embedded = dit.embed_time(times)
    made = (embedded, dit.modulation(embedded))
    used = sum(t.numel() for t in made)
    by_token = TOKENS_5B * 7 * dit.config.dim  # an embedding and six modulations each
    assert used * 100 <= by_token
    assert used == 2 * 7 * dit.config.dim
    # blocks walk over runs of one time: nothing is gathered to the length of the sequence
    assert [span.tokens for span in spans_of(clock, TOKENS_5B)] == [slice(0, 880), slice(880, TOKENS_5B)]


def test_a_call_embeds_two_times_and_no_more(dit: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, embed = [], dit.embed_time
    monkeypatch.setattr(dit, "embed_time", lambda times: seen.append(times.tolist()) or embed(times))
    branch = dit.prepare(Conditions(text=torch.randn(1, 5, 32)))
    latents = torch.randn(1, 48, 3, 4, 4)
    by_frame = first_frame_clean(3)
    [one] = dit(latents, by_frame, [branch])
    [other] = dit(latents, by_frame.repeat_interleave(4, dim=1), [branch])
    assert seen == [[[0.0, 702.25]]] * 2
    assert torch.equal(one, other)

"""The reference's tokens stand in front of the video, under its clock, and at time 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.reference import Reference
from diffsynth.errors import ArgumentError, ConfigurationError
from diffsynth.models.wan.adapters.reference import ReferenceAdapter, ReferenceConfig
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.stream import TokenStream
from diffsynth.ops.rope import video_rotation
from tests.toys import TOY_DIT

GRID = (3, 2, 4)
TOKENS = 3 * 2 * 4
REFERENCE = Reference(latents=torch.randn(1, 16, 1, 4, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def adapter() -> ReferenceAdapter:
    return ReferenceAdapter(ReferenceConfig(dim=48, in_dim=16)).requires_grad_(False)


@pytest.fixture
def dit() -> WanDiT:
    return WanDiT(TOY_DIT).requires_grad_(False)


def stream(clock: torch.Tensor | None, num_times: int = 1) -> TokenStream:
    return TokenStream(
        x=torch.zeros(2, TOKENS, 48), rotary=video_rotation(GRID, 24, torch.device("cpu")), grid=GRID,
        video=slice(0, TOKENS), times=torch.zeros(2, num_times), clock=clock,
    )  # fmt: skip


def test_the_video_moves_one_frame_on(adapter: ReferenceAdapter, dit: WanDiT) -> None:
    made = adapter.extend(stream(None), adapter.prepare(REFERENCE, dit), None)
    assert made.x.shape == (2, TOKENS + 8, 48) and made.video == slice(8, TOKENS + 8)
    assert (made.x[:, made.video] == 0).all() and (made.x[:, :8] != 0).any()
    assert torch.equal(made.rotary, video_rotation((4, 2, 4), 24, torch.device("cpu")))
    assert made.clock is None and made.grid == GRID


def test_the_reference_follows_the_clock_of_the_last_frame(adapter: ReferenceAdapter, dit: WanDiT) -> None:
    clock = torch.tensor([0, 1, 1]).repeat_interleave(8)
    made = adapter.extend(stream(clock, 2), adapter.prepare(REFERENCE, dit), None)
    assert made.clock is not None and made.clock.tolist() == [1] * 8 + [0] * 8 + [1] * 16


def test_tokens_of_others_stay_around_it(adapter: ReferenceAdapter, dit: WanDiT) -> None:
    bare = stream(torch.zeros(TOKENS, dtype=torch.int64))
    marks = torch.arange(2 + TOKENS + 1.0)[None, :, None].expand(2, -1, 48)
    rotary = torch.full((2 + TOKENS + 1, 1, 12, 2), 7.0)
    around = replace(
        bare, x=marks, rotary=rotary, video=slice(2, 2 + TOKENS), clock=torch.zeros(3 + TOKENS).long()
    )
    made = adapter.extend(around, adapter.prepare(REFERENCE, dit), None)
    assert made.video == slice(10, 10 + TOKENS) and made.x.shape[1] == TOKENS + 11
    assert made.x[0, :2, 0].tolist() == [0, 1] and made.x[0, -1, 0] == 2 + TOKENS
    assert torch.equal(made.x[:, made.video], marks[:, 2:-1])
    assert (made.rotary[:2] == 7).all() and (made.rotary[-1] == 7).all()
    assert torch.equal(made.rotary[2:-1], video_rotation((4, 2, 4), 24, torch.device("cpu")))


def test_a_picture_of_another_size_is_told(adapter: ReferenceAdapter, dit: WanDiT) -> None:
    def extended(latents: torch.Tensor) -> None:
        adapter.extend(stream(None), adapter.prepare(Reference(latents=latents), dit), None)

    with pytest.raises(ArgumentError, match="encode the picture at the size of the video"):
        extended(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ArgumentError, match="one frame"):
        extended(torch.zeros(1, 16, 2, 4, 8))


def test_pinned_frames_and_a_reference_go_together(adapter: ReferenceAdapter, dit: WanDiT) -> None:
    """With one time for all frames, said frame by frame, the velocity is that of one time."""
    latents = torch.randn(1, 16, 3, 4, 8)
    text = torch.randn(1, 4, 32)
    branch = dit.prepare(Conditions(text=text, adapters={"reference": REFERENCE}), [adapter])
    [plain] = dit(latents, torch.tensor([500.0]), [branch])
    [pinned] = dit(latents, torch.tensor([[0.0, 500.0, 500.0]]), [branch])
    assert plain.shape == pinned.shape == latents.shape
    assert not torch.allclose(plain, pinned, atol=1e-3)
    [bare] = dit(latents, torch.tensor([500.0]), [dit.prepare(Conditions(text=text), [adapter])])
    assert not torch.allclose(plain, bare, atol=1e-3)


def test_adapters_of_another_patch_are_refused(adapter: ReferenceAdapter) -> None:
    adapter.join(TOY_DIT)
    with pytest.raises(ConfigurationError, match="reads 16 channels in patches of"):
        adapter.join(replace(TOY_DIT, in_dim=48, out_dim=48))

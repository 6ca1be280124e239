"""VACE blocks beside the DiT: they hint, they stream, they keep their keys, they find their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.vace import VaceCondition
from diffsynth.errors import ArgumentError, ConfigurationError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.adapters.vace import VaceAdapter, VaceConfig
from diffsynth.models.wan.dit import Branch, WanDiT
from diffsynth.models.wan.probe import Probe
from diffsynth.models.wan.stream import TokenStream
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.sampling.step import Step
from tests.golden_recipe import recipe_state_dict
from tests.step_caches import NoCache, step
from tests.toys import TOY_DIT
from tests.vace_toys import TOY_VACE, vace_pipeline, write_toy_speed

LATENTS = (1, 16, 2, 4, 4)


def drawn(network: nn.Module, seed: int) -> Any:
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(recipe_state_dict(shapes, seed))
    return network.requires_grad_(False).eval()


@pytest.fixture
def dit() -> WanDiT:
    network: WanDiT = drawn(WanDiT(TOY_DIT), 1)
    return network


@pytest.fixture
def vace() -> VaceAdapter:
    network: VaceAdapter = drawn(VaceAdapter(TOY_VACE), 2)
    network.join(TOY_DIT)
    return network


def branches_of(dit: WanDiT, vace: VaceAdapter, given: VaceCondition, count: int = 2) -> list[Branch]:
    texts = torch.randn(count, 1, 5, 32, generator=torch.Generator().manual_seed(0))
    sides = [Conditions(text=text, adapters={"vace": given}) for text in texts]
    return [dit.prepare(side, [vace], side=i) for i, side in enumerate(sides)]


def condition(**more: Any) -> VaceCondition:
    context = torch.randn(1, 96, *LATENTS[2:], generator=torch.Generator().manual_seed(1))
    return VaceCondition(**{"context": context, **more})


def ask(dit: WanDiT, branches: list[Branch], time: float = 500.0) -> list[Tensor]:
    with torch.no_grad():
        return dit(torch.ones(LATENTS), torch.tensor([time]), branches)


class Visits:
    """Yields the blocks and notes what was asked."""

    def __init__(self) -> None:
        self.has_keys: list[bool] = []
        self.seen: list[int] = []
        self.is_inside = False

    def __call__(self, blocks: Iterable[nn.Module], *, has_keys: bool = False) -> Iterator[nn.Module]:
        self.has_keys.append(has_keys)
        for index, block in enumerate(blocks):
            self.seen.append(index)
            self.is_inside = True
            try:
                yield block
            finally:
                self.is_inside = False


def test_each_block_comes_in_once_for_both_sides_and_leaves_at_the_end(
    dit: WanDiT, vace: VaceAdapter
) -> None:
    visits = vace.visit = Visits()
    branches = branches_of(dit, vace, condition())
    together = ask(dit, branches)
    assert visits.seen == [0, 1] and not visits.is_inside
    ask(dit, branches)
    assert visits.seen == [0, 1, 0, 1] and visits.has_keys == [False, True]
    visits.seen.clear()
    apart = [ask(dit, [branch])[0] for branch in branches]  # as where memory is short
    assert visits.seen == [0, 1, 0, 1]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_kept_keys_change_nothing_and_go_with_their_generation(dit: WanDiT, vace: VaceAdapter) -> None:
    branches = branches_of(dit, vace, condition())
    first, second = ask(dit, branches), ask(dit, branches)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        slots = [branch.keys.of(block, keeps=True) for branch in branches for block in vace.blocks]
    kept = [ref(slot.keys) for slot in slots if slot.keys is not None]
    assert len(kept) == 4
    vace.keeps_keys = False
    fresh = branches_of(dit, vace, condition())
    assert all(torch.equal(a, b) for a, b in zip(first, ask(dit, fresh), strict=True))
    del branches, fresh, slots
    assert all(keys() is None for keys in kept)


class Answers(NoCache):
    """A step cache that answers for one side of the guidance."""

    def recall(self, step: Step, side: int, probe: Probe) -> Tensor | None:
        return torch.zeros(1, 8, TOY_DIT.dim) if side == 0 else None


def test_side_that_a_cache_answers_does_not_hold_up_the_other(dit: WanDiT, vace: VaceAdapter) -> None:
    visits = vace.visit = Visits()
    branches = branches_of(dit, vace, condition())
    expected = ask(dit, branches)[1]
    with torch.no_grad():
        for _ in range(3):
            made = dit(torch.ones(LATENTS), torch.tensor([500.0]), branches, Answers(), step=step())
    assert torch.equal(made[1], expected) and visits.seen == [0, 1] * 4


def test_scale_counts_and_zero_leaves_the_blocks_out(dit: WanDiT, vace: VaceAdapter) -> None:
    visits = vace.visit = Visits()
    plain = ask(dit, [dit.prepare(Conditions(text=torch.ones(1, 5, 32)), [vace])])[0]

    def made(scale: float) -> Tensor:
        sides = Conditions(text=torch.ones(1, 5, 32), adapters={"vace": condition(scales=(scale,))})
        return ask(dit, [dit.prepare(sides, [vace])])[0]

    assert torch.equal(made(0.0), plain) and not visits.seen
    near, far = ((made(scale) - plain).norm() for scale in (0.1, 1.0))
    assert 0 < near < far


def test_each_step_has_its_scale() -> None:
    given = condition(scales=(1.0, 0.5, 0.0))
    assert [given.scale_at(step(index, 3)) for index in range(3)] == [1.0, 0.5, 0.0]
    for other, words in ((None, "no steps"), (step(0, 4), "4 steps")):
        with pytest.raises(ArgumentError, match=f"3 numbers, one per step, and there are {words}"):
            given.scale_at(other)


class Front(DiTAdapter):
    """Puts two tokens in front of the video's."""

    name = "front"

    def extend(self, stream: TokenStream, memory: object, step: Step | None) -> TokenStream:
        return stream.with_tokens(stream.x[:, :2], stream.rotary[:2])


@pytest.mark.parametrize("timestep", [[500.0], [[0.0, 500.0]]], ids=["one-time", "two-clocks"])
def test_hints_are_for_the_tokens_of_the_video(dit: WanDiT, vace: VaceAdapter, timestep: list[Any]) -> None:
    seen: list[tuple[Tensor, int]] = []

    def note(block: nn.Module, given: tuple[Any, ...]) -> None:
        x, rotary, _, call = given
        assert rotary.shape[0] == x.shape[1] == call.spans[-1].tokens.stop == 8
        seen.append((x.clone(), len(call.spans)))

    for block in vace.blocks:
        block.register_forward_pre_hook(note)
    given = {"vace": condition(), "front": 1}
    conditions = Conditions(text=torch.ones(1, 5, 32), adapters=given)
    for adapters in ([vace], [Front(), vace]):
        branch = dit.prepare(conditions, adapters)
        with torch.no_grad():
            [velocity] = dit(torch.ones(LATENTS), torch.tensor(timestep), [branch])
        assert velocity.shape == LATENTS
    assert len(seen) == 4 and torch.equal(seen[0][0], seen[2][0]), "the same tokens enter VACE"
    assert {count for _, count in seen} == {len(timestep[0]) if isinstance(timestep[0], list) else 1}


def test_context_of_other_latents_is_refused(dit: WanDiT, vace: VaceAdapter) -> None:
    with pytest.raises(ArgumentError, match=r"need \(B, 96, 2, 4, 4\)"):
        ask(dit, branches_of(dit, vace, condition(context=torch.zeros(1, 96, 3, 4, 4))))


def test_hints_spread_evenly_over_the_dit() -> None:
    module_only = VaceAdapter(replace(TOY_VACE, vace_layers=None))
    module_only.join(replace(TOY_DIT, num_layers=6))
    assert module_only._turns == {0: 0, 3: 1}


@pytest.mark.parametrize(
    ("own", "theirs", "says"),
    [
        ({"vace_layers": None}, {"num_layers": 5}, "do not spread evenly over 5"),
        ({"vace_layers": (0, 7)}, {}, "has 2 blocks"),
        ({}, {"num_heads": 4}, "heads 2 and the DiT 4"),
        ({}, {"patch_size": (1, 1, 1)}, "patches"),
    ],
)
def test_dit_that_does_not_fit_is_refused(own: dict[str, Any], theirs: dict[str, Any], says: str) -> None:
    adapter = VaceAdapter(replace(TOY_VACE, **own))
    with pytest.raises(ConfigurationError, match=says):
        adapter.join(replace(TOY_DIT, **theirs))


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), (0,)], ids=str)
def test_layers_that_are_no_places_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="for each of the 2 VACE blocks, rising"):
        VaceAdapter(replace(TOY_VACE, vace_layers=layers))


def test_official_widths_build() -> None:
    with torch.device("meta"):
        adapter = VaceAdapter(VaceConfig(dim=1536, ffn_dim=8960, num_heads=12, num_vace_blocks=15))
    # 2,153,972,032 of VACE-1.3B less 1,418,996,800 of T2V-1.3B
    assert sum(p.numel() for p in adapter.parameters()) == 734_975_232


ARGUMENTS: dict[str, Any] = {
    "prompt_embeds": torch.ones(1, 5, 32), "negative_prompt_embeds": torch.zeros(1, 3, 32), "seed": 0,
    "vace_video": torch.rand(5, 3, 16, 32, generator=torch.Generator().manual_seed(3)),
    "output_type": "latent",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> WanVideoPipeline:
    return vace_pipeline(tmp_path_factory.mktemp("vace"))


@pytest.mark.parametrize("num_persistent", [0, 60_000], ids=["all-stream", "some-stay"])
def test_streamed_equals_resident_bit_for_bit(pipe: WanVideoPipeline, num_persistent: int) -> None:
    expected = pipe(**ARGUMENTS)
    pipe.enable_vram_management(num_persistent)
    assert torch.equal(pipe(**ARGUMENTS), expected)
    counts = pipe._residency.counts("vace")
    assert counts is not None and counts.copies
    pipe.disable_vram_management()
    assert torch.equal(pipe(**ARGUMENTS), expected)


def test_module_in_a_file_of_its_own_joins_a_text_to_video_dit(tmp_path: Path) -> None:
    pipe = vace_pipeline(tmp_path, is_module_only=True)
    assert pipe.parts.facts.adapters == {"vace"} and pipe.parts.family == "t2v"
    plain = pipe(**{k: v for k, v in ARGUMENTS.items() if k != "vace_video"})
    made = pipe(**ARGUMENTS)
    assert torch.isfinite(made).all() and not torch.equal(made, plain)


def test_speed_control_changes_what_vace_makes(tmp_path: Path) -> None:
    speed = write_toy_speed(tmp_path / "speed.safetensors")
    pipe = vace_pipeline(tmp_path, beside=[speed])
    assert pipe.parts.facts.adapters == {"vace", "speed"}
    expected = [pipe(**ARGUMENTS, motion_bucket_id=number) for number in (0, 100)]
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[0], pipe(**ARGUMENTS))
    pipe.enable_vram_management(0)
    assert torch.equal(pipe(**ARGUMENTS, motion_bucket_id=100), expected[1])

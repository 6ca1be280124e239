"""The DiT's places: planes, doors, clocks, branches, caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.errors import ArgumentError, ConfigurationError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig, plane_channels
from diffsynth.models.wan.stream import Call, TokenStream, read_clocks
from diffsynth.models.wan.text_tokens import compact_padding, standin_scores
from diffsynth.ops.attention import attend
from diffsynth.sampling.step import Step
from tests.step_caches import EverySecondStep, step


def _dit(**changes: object) -> WanDiT:
    torch.manual_seed(3)
    sizes: dict[str, object] = {
        "dim": 48, "in_dim": 16, "out_dim": 16, "ffn_dim": 64, "num_layers": 2, "num_heads": 2,
        "freq_dim": 32, "text_dim": 24, "text_len": 40,
    }  # fmt: skip
    return WanDiT(DiTConfig(**{**sizes, **changes})).requires_grad_(False)  # type: ignore[arg-type]


def _text(tokens: int = 5) -> Conditions:
    return Conditions(text=torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(1)))


LATENTS = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
NOW = torch.tensor([700.0])


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "names"),
    [(16, 16, []), (36, 16, ["mask", "image"]), (32, 16, ["image"]), (48, 16, ["control", "image"]),
     (52, 16, ["control", "mask", "image"]), (48, 48, []), (100, 48, ["mask", "image"]),
     (148, 48, ["control", "mask", "image"])],
)  # fmt: skip
def test_extra_channels_name_the_planes(in_dim: int, out_dim: int, names: list[str]) -> None:
    planes = plane_channels(in_dim, out_dim)
    assert list(planes) == names and sum(planes.values()) == in_dim - out_dim


def test_unknown_extra_channels_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="23"):
        plane_channels(39, 16)


def test_an_absent_plane_is_zeros_and_an_unknown_one_is_refused() -> None:
    dit = _dit(in_dim=48)
    image = torch.randn(1, 16, 3, 4, 6)
    both = {"image": image, "control": torch.zeros_like(image)}
    made = [
        dit(LATENTS, NOW, [dit.prepare(Conditions(text=_text().text, planes=planes))])[0]
        for planes in ({"image": image}, both)
    ]
    assert torch.equal(*made)
    with pytest.raises(ArgumentError, match="no plane for depth"):
        dit.prepare(Conditions(text=_text().text, planes={"depth": image}))
    with pytest.raises(ArgumentError, match="none was given"):
        dit.prepare(_text())


class _Open(DiTAdapter):
    """Opens every door and notes who came."""

    name = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[str] = []

    def prepare(self, given: object, dit: WanDiT) -> object:
        self.visits.append("prepare")
        return given

    def time(self, embedded: Tensor, memory: object, step: Step | None) -> Tensor:
        self.visits.append("time")
        return embedded

    def modulate(self, t_mod: Tensor, memory: object, step: Step | None) -> Tensor:
        self.visits.append("modulate")
        return t_mod + 0.1

    def embed(self, grid: Tensor, memory: object, step: Step | None) -> Tensor:
        assert grid.shape == (1, 48, 3, 2, 3)
        self.visits.append("embed")
        return grid + 0.1

    def extend(self, stream: TokenStream, memory: object, step: Step | None) -> TokenStream:
        self.visits.append("extend")
        return stream

    def begin(self, stream: TokenStream, memory: object, call: Call, step: Step | None) -> object:
        self.visits.append("begin")
        return memory

    def after_block(self, index: int, x: Tensor, state: object, memory: object, step: Step | None) -> Tensor:
        assert state == "given"
        self.visits.append(f"after {index}")
        return x + 0.1


def test_every_door_is_visited_in_order_and_closed_doors_change_nothing() -> None:
    dit, adapter = _dit(), _Open()
    conditions = Conditions(text=_text().text, adapters={"toy": "given"})
    [plain] = dit(LATENTS, NOW, [dit.prepare(_text())])
    [opened] = dit(LATENTS, NOW, [dit.prepare(conditions, [adapter])])
    assert adapter.visits == [
        "prepare", "embed", "extend", "time", "modulate", "begin", "after 0", "after 1",
    ]  # fmt: skip
    assert not torch.allclose(plain, opened)
    closed = DiTAdapter()
    closed.name = "toy"
    [same] = dit(LATENTS, NOW, [dit.prepare(conditions, [closed])])
    assert torch.equal(plain, same)


def test_an_adapter_without_an_input_is_not_visited() -> None:
    dit, adapter = _dit(), _Open()
    dit(LATENTS, NOW, [dit.prepare(_text(), [adapter])])
    assert adapter.visits == []


def test_clocks_are_counted_not_repeated() -> None:
    grid = (3, 2, 3)
    assert read_clocks(torch.tensor([5.0, 6.0]), grid)[1] is None
    times, clock = read_clocks(torch.tensor([[0.0, 700.0, 700.0]]), grid)
    assert times.tolist() == [[0.0, 700.0]] and clock is not None
    assert clock.tolist() == [0] * 6 + [1] * 12
    assert read_clocks(torch.full((1, 18), 700.0), grid)[1] is None
    with pytest.raises(ArgumentError, match="timestep has shape"):
        read_clocks(torch.zeros(1, 5), grid)


def test_one_time_per_frame_equals_one_time_per_token() -> None:
    dit = _dit()
    frames = torch.tensor([[0.0, 700.0, 700.0]])
    made = [
        dit(LATENTS, timestep, [dit.prepare(_text())])[0]
        for timestep in (frames, frames.repeat_interleave(6, dim=1))
    ]
    assert torch.equal(*made)
    [one] = dit(LATENTS, NOW, [dit.prepare(_text())])
    [same] = dit(LATENTS, NOW[:, None].expand(1, 3), [dit.prepare(_text())])
    assert torch.equal(one, same) and not torch.allclose(one, made[0])


@pytest.mark.parametrize(
    ("grid", "num_clean"),
    # patches of A14B at 480 x 832 x 81, and of TI2V-5B at 704 x 1280 x 121 with its first frame pinned
    [pytest.param((21, 30, 52), 0, id="A14B"), pytest.param((31, 22, 40), 1, id="5B")],
)
def test_time_embeddings_take_a_hundredth_of_those_by_token_and_less(
    grid: tuple[int, int, int], num_clean: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens = grid[0] * grid[1] * grid[2]
    by_frame = torch.full((1, grid[0]), 700.0)
    by_frame[:, :num_clean] = 0.0
    times, _ = read_clocks(by_frame.repeat_interleave(grid[1] * grid[2], dim=1), grid)
    assert num_tokens >= 100 * times.shape[1]
    # and the network embeds those alone
    made: list[int] = []
    embed = WanDiT.embed_time

    def counting(dit: WanDiT, given: torch.Tensor) -> torch.Tensor:
        embedded = embed(dit, given)
        both = (embedded, dit.modulation(embedded))
        made.append(sum(tensor.untyped_storage().nbytes() for tensor in both))
        return embedded

    monkeypatch.setattr(WanDiT, "embed_time", counting)
    dit = _dit()
    frames = torch.tensor([[0.0, 700.0, 700.0]]) if num_clean else torch.full((1, 3), 700.0)
    dit(LATENTS, frames.repeat_interleave(6, dim=1), [dit.prepare(_text())])
    assert made == [4 * 7 * dit.config.dim * times.shape[1]]


def test_both_sides_of_the_guidance_together_equal_each_alone() -> None:
    dit = _dit()
    sides = [_text(5), _text(9)]
    together = dit(LATENTS, NOW, [dit.prepare(side) for side in sides])
    for side, made in zip(sides, together, strict=True):
        assert torch.equal(made, dit(LATENTS, NOW, [dit.prepare(side)])[0])


def test_a_batch_equals_its_samples() -> None:
    dit = _dit()
    latents, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 7, 24)
    text[1, 3:] = 0
    [both] = dit(latents, torch.tensor([900.0, 30.0]), [dit.prepare(Conditions(text=text))])
    for index, (tokens, time) in enumerate([(7, 900.0), (3, 30.0)]):
        alone = dit.prepare(Conditions(text=text[index : index + 1, :tokens]))
        [one] = dit(latents[index : index + 1], torch.tensor([time]), [alone])
        # The same sums in batches of another size.
        torch.testing.assert_close(both[index], one[0], atol=1e-5, rtol=1e-5)


def test_chunks_of_the_feed_forward_change_nothing() -> None:
    dit = _dit()
    with torch.no_grad():
        [whole] = dit(LATENTS, NOW, [dit.prepare(_text())])
        dit.ffn_chunk_tokens = 5
        [chunked] = dit(LATENTS, NOW, [dit.prepare(_text())])
    torch.testing.assert_close(whole, chunked, atol=1e-6, rtol=1e-5)


def test_a_step_cache_answers_instead_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    dit, cache = _dit(), EverySecondStep(of_blocks=True)
    branch = dit.prepare(_text(), side=1)
    [first] = dit(LATENTS, NOW, [branch], cache, step=step(0))
    assert list(cache.kept) == [("high", 1)]
    for block in dit.blocks:
        monkeypatch.setattr(block, "forward", lambda *_: pytest.fail("a block ran"))
    [second] = dit(LATENTS, NOW, [branch], cache, step=step(1))
    with pytest.raises(ArgumentError, match="without a step"):
        dit(LATENTS, NOW, [branch], cache)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)  # x + (y - x) for y


@pytest.mark.parametrize("padding", [13, 60, 505])
def test_stand_ins_weigh_as_much_as_the_padding(padding: int) -> None:
    scores = standin_scores(padding, 6)
    assert torch.equal(scores, scores.to(torch.bfloat16).float())
    assert abs(scores.double().exp().sum() / padding - 1) < 1e-6


def test_compact_padding_attends_as_the_padded_text_does() -> None:
    text, project = torch.randn(1, 9, 24), torch.randn(24, 32)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 503))
    tokens = compact_padding(padded, 512)
    assert tokens.x.shape[1] < 32 and tokens.bias is not None
    q = torch.randn(1, 6, 4, 8)

    def keys(x: Tensor) -> Tensor:
        return (x @ project + 0.3).view(1, -1, 4, 8)  # the bias makes keys of padding matter

    scores = torch.einsum("blnd,bsnd->bnls", q.double(), keys(padded).double()) / 8**0.5
    expected = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), 2 * keys(padded).double())
    made = attend(q, keys(tokens.x), 2 * keys(tokens.x), bias=tokens.bias)
    torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-5)


def test_text_longer_than_text_len_keeps_every_row() -> None:
    tokens = compact_padding(torch.ones(1, 70, 24), 40)
    assert tokens.x.shape[1] == 70 and tokens.bias is None


def test_gradients_reach_every_parameter() -> None:
    dit = _dit().requires_grad_(True)
    [velocity] = dit(LATENTS, NOW, [dit.prepare(_text())])
    velocity.square().mean().backward()
    assert [name for name, p in dit.named_parameters() if p.grad is None] == []


def test_sizes_that_do_not_divide_are_refused() -> None:
    dit = _dit()
    with pytest.raises(ArgumentError, match="do not divide by the patch"):
        dit(torch.randn(1, 16, 3, 5, 6), NOW, [dit.prepare(_text())])
    with pytest.raises(ArgumentError, match="text features are 12 wide"):
        dit.prepare(Conditions(text=torch.randn(1, 3, 12)))

"""Fp8 weights are widened once per block and pass, and nothing of them is left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

from diffsynth.ops import fp8
from diffsynth.ops.fp8 import Fp8Linear, WideningRoom, fp8_layers, quantise
from diffsynth.vram_management.fp8 import WidenOnce, widening
from diffsynth.vram_management.visit import in_order


def block(width: int = 32, count: int = 2) -> nn.Sequential:
    layers = [Fp8Linear(nn.Linear(width, width, bias=False)) for _ in range(count)]
    for layer in layers:
        layer.weight.data, layer.weight_scale = quantise(torch.randn(width, width))
    return nn.Sequential(*layers)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pointers of the stored weights that were widened, in order."""
    pointers: list[int] = []
    widen = fp8.widen

    def counted(stored: Tensor, *arguments: object) -> Tensor:
        pointers.append(stored.data_ptr())
        return widen(stored, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8, "widen", counted)
    return pointers


def two_branches(visit: WidenOnce, blocks: nn.ModuleList, chunks: int = 1) -> list[Tensor]:
    streams = [torch.ones(4, 32), torch.full((4, 32), -0.5)]
    for one in visit(blocks):
        streams = [torch.cat([one(part) for part in x.chunk(chunks)]) for x in streams]
    return streams


@pytest.mark.parametrize("chunks", [1, 4])
def test_both_branches_share_one_widening_and_see_the_same_numbers(chunks: int, widened: list[int]) -> None:
    blocks = nn.ModuleList(block() for _ in range(3))
    plain = two_branches(in_order, blocks, chunks)  # type: ignore[arg-type]
    assert len(widened) == 2 * 6 * chunks, "each call widens for itself"
    widened.clear()
    shared = two_branches(WidenOnce(), blocks, chunks)
    assert widened == [layer.weight.data_ptr() for layer in fp8_layers(blocks)], "once each, in order"
    assert all(torch.equal(a, b) for a, b in zip(plain, shared, strict=True))


def test_memory_is_taken_once_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = nn.ModuleList([nn.Sequential(), block(), block(), block(width=32, count=1), nn.Sequential()])
    taken: list[int] = []
    empty = torch.empty

    def counted(*size: object, **options: object) -> Tensor:
        made = empty(*size, **options)  # type: ignore[call-overload]
        taken.append(made.numel())
        return made  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "empty", counted)
    two_branches(WidenOnce(), blocks)
    assert taken == [2 * 32 * 32], "the room of the largest block"


def test_layers_that_a_pass_leaves_out_are_not_widened(widened: list[int]) -> None:
    one = block()
    for here in WidenOnce()([one], has_keys=True):
        here[0](torch.ones(1, 32))
    assert widened == [one[0].weight.data_ptr()]


def test_layers_that_multiply_in_fp8_take_no_room() -> None:
    room, one = WideningRoom(), block()
    one[0].compute = "fp8"
    room.open(list(one))
    one[1](torch.ones(1, 32))
    assert room._memory is not None and room._memory.numel() == 32 * 32


@pytest.mark.parametrize("shares_on_gpu", [False, True])
def test_a_gpu_shares_when_asked_to(shares_on_gpu: bool) -> None:
    one = block().to("meta")  # any device but the CPU
    for _ in WidenOnce(shares_on_gpu=shares_on_gpu)([one]):
        assert [layer.room is not None for layer in fp8_layers(one)] == 2 * [shares_on_gpu]


def test_another_dtype_in_the_same_block_is_widened_apart() -> None:
    one = block()
    for here in WidenOnce()([one]):
        a, b = here[0](torch.ones(1, 32)), here[0](torch.ones(1, 32, dtype=torch.bfloat16))
        assert torch.equal(here[0](torch.ones(1, 32)), a)
    assert torch.equal(b, one[0](torch.ones(1, 32, dtype=torch.bfloat16)))


def test_the_inner_visit_brings_blocks_and_hears_about_keys() -> None:
    heard: list[object] = []

    def inner(blocks: Iterable[nn.Module], *, has_keys: bool = False) -> Iterator[nn.Module]:
        for one in blocks:
            heard.append(has_keys)
            assert all(layer.room is None for layer in fp8_layers(one)), "not before it is there"
            yield one
            assert all(layer.room is None for layer in fp8_layers(one)), "nor when it goes"
            heard.append("gone")

    blocks = [block(), block()]
    for _ in WidenOnce(inner)(blocks, has_keys=True):
        pass
    assert heard == [True, "gone", True, "gone"]


@pytest.mark.parametrize("place", ["a block", "between"])
def test_an_error_leaves_nothing_behind(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[weakref.ref[WideningRoom]] = []
    opened = WideningRoom.open

    def open_seen(self: WideningRoom, layers: list[Fp8Linear]) -> None:
        rooms.append(weakref.ref(self))
        opened(self, layers)

    monkeypatch.setattr(WideningRoom, "open", open_seen)
    blocks, visit = nn.ModuleList(block() for _ in range(3)), WidenOnce()

    def run() -> None:
        for index, one in enumerate(visit(blocks)):
            one(torch.ones(1, 31 if index == 1 and place == "a block" else 32))
            if index == 1:
                raise ValueError("in the middle")

    with pytest.raises((RuntimeError, ValueError)):
        run()
    gc.collect()
    assert all(layer.room is None for layer in fp8_layers(blocks)) and rooms and rooms[0]() is None
    before = two_branches(in_order, blocks)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, two_branches(visit, blocks), strict=True))


def test_a_walk_closed_late_does_not_disturb_the_next() -> None:
    blocks, visit = [block(), block()], WidenOnce()
    cut_off = visit(blocks)
    next(cut_off)
    following = visit(blocks)
    next(following)
    room = blocks[0][0].room
    cut_off.close()  # type: ignore[attr-defined]
    assert room is not None and blocks[0][0].room is room


def test_networks_without_fp8_keep_their_visit() -> None:
    assert widening(nn.Linear(2, 2), in_order) is in_order
    visit = widening(block(), in_order)
    assert isinstance(visit, WidenOnce) and visit.inner is in_order

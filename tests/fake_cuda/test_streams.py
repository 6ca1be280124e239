"""Weights that come and go on streams of their own are whole when they are read, however late a copy runs.

Blocks hold numbers that name them; "compute" is a copy on the compute's stream, which runs when that stream
gets there. Late copies find a reader that does not wait, late compute a writer that does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from diffsynth.training.offload import CheckpointOffload
from diffsynth.vram_management import copiers
from diffsynth.vram_management.memory_plan import NetworkPlan
from diffsynth.vram_management.residency import Residency
from diffsynth.vram_management.streaming import BlockStream, Host
from diffsynth.vram_management.visit import in_order
from tests.fake_cuda import controls

CUDA = torch.device("cuda", 0)
NUM_NUMBERS = 30_000
LATE = {"copies-late": {"copies_us": 4000}, "compute-late": {"compute_us": 4000}}
Arranged = tuple[int, int, tuple[int, ...], Host]  # blocks, slots, which blocks stay, where the rest lie
Seen = list[tuple[float, Tensor]]  # what a tensor should hold, and what was read


@pytest.fixture(
    params=[pytest.param(name, marks=() if name == "copies-late" else pytest.mark.slow) for name in LATE]
)
def lateness(request: pytest.FixtureRequest) -> Iterator[None]:
    random.seed(0)
    controls.delays(**LATE[request.param])
    yield


class Block(nn.Module):
    key_layers = ("k.",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.full((NUM_NUMBERS,), 2.0 * number + 1), requires_grad=False)
        self.k = nn.Module()
        self.k.weight = nn.Parameter(torch.full((NUM_NUMBERS // 2,), 2.0 * number + 2), requires_grad=False)


class Network(nn.Module):
    def __init__(self, first: int, num_blocks: int) -> None:
        super().__init__()
        self.first = first
        self.blocks = nn.ModuleList(Block(first + i) for i in range(num_blocks))
        self.rest = nn.Parameter(torch.full((5000,), -1.0 - first), requires_grad=False)
        self.visit = in_order


def read(block: nn.Module, number: int, *, has_keys: bool = False) -> Seen:
    for _ in range(random.choice([0, 0, 2])):
        block.q.clone()  # compute takes unequally long
    found = [(2.0 * number + 1, block.q.clone())]
    return found if has_keys else [*found, (2.0 * number + 2, block.k.weight.clone())]


def num_wrong(seen: Seen) -> int:
    torch.cuda.synchronize()
    return sum(not bool((tensor.cpu() == value).all()) for value, tensor in seen)


def streamed(arranged: Arranged, *, keys: bool = False, walks: int = 5) -> Seen:
    num_blocks, num_slots, resident, host = arranged
    blocks = [Block(i) for i in range(num_blocks)]
    stream = BlockStream(blocks, device=CUDA, resident=resident, num_slots=num_slots, host=host)
    seen: Seen = []
    for walk in range(walks):
        has_keys = keys and walk > 0
        for number, block in enumerate(stream(blocks, has_keys=has_keys)):
            seen += read(block, number, has_keys=has_keys)
        if walk == 2:
            stream.stop()
    torch.cuda.synchronize()
    stream.close()
    return seen


ARRANGED: list[Arranged] = [
    (6, 2, (), "pinned"), (6, 2, (), "ring"), (7, 2, (1, 4), "pinned"), (6, 3, (), "pinned"),
    (5, 3, (2,), "ring"), (2, 2, (), "pinned"), (3, 2, (), "pinned"),
]  # fmt: skip


@pytest.mark.usefixtures("lateness")
@pytest.mark.parametrize("keys", [False, True], ids=["", "keys-kept"])
@pytest.mark.parametrize(
    "arranged",
    [pytest.param(a, marks=() if i < 2 else pytest.mark.slow) for i, a in enumerate(ARRANGED)],
    ids=str,
)
def test_streamed_blocks_are_whole(arranged: Arranged, keys: bool) -> None:
    assert num_wrong(streamed(arranged, keys=keys)) == 0


@pytest.mark.usefixtures("lateness")
@pytest.mark.parametrize("sizes", [(6, 2), pytest.param((5, 3), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("host", ["pinned", "ring"])
def test_blocks_of_a_backward_pass_are_whole(sizes: tuple[int, int], host: Host) -> None:
    blocks = [Block(i) for i in range(sizes[0])]
    stream = BlockStream(blocks, device=CUDA, num_slots=sizes[1], host=host)
    stream.returns = True
    seen: Seen = []
    for step in range(4):
        for number, block in enumerate(stream(blocks)):
            seen += read(block, number)
        for number in reversed(range(0 if step == 3 else len(blocks))):  # the last pass has no backward one
            stream.bring_back(blocks[number])
            seen += read(blocks[number], number)
            if (step, number) == (2, 1):
                break
    assert num_wrong(seen) == 0
    stream.close()


TWINS: list[Arranged] = [
    (6, 2, (2,), "pinned"), (6, 2, (2,), "ring"), (7, 2, (0, 3, 6), "pinned"), (5, 3, (), "ring"),
    (4, 2, (0, 1, 2), "pinned"),
]  # fmt: skip


@pytest.mark.usefixtures("lateness")
@pytest.mark.parametrize(
    "arranged",
    [pytest.param(a, marks=() if i < 1 else pytest.mark.slow) for i, a in enumerate(TWINS)],
    ids=str,
)
def test_an_expert_that_takes_over_memory_is_whole(arranged: Arranged) -> None:
    num_blocks, num_slots, resident, host = arranged
    networks = {"dit": Network(0, num_blocks), "dit_low_noise": Network(100, num_blocks)}
    residency = Residency(networks, CUDA)
    residency.arrange({
        name: NetworkPlan(network=name, where="streamed", num_blocks=num_blocks, resident_blocks=resident,
                          num_slots=num_slots, host=host, is_of_pair=True) for name in networks
    })  # fmt: skip
    seen: Seen = []
    for turn in range(3):
        for name, follower in (("dit", "dit_low_noise"), ("dit_low_noise", None)):
            for step in range(2):
                residency.enter(name)
                if step and follower:
                    residency.send_ahead(follower)
                network = networks[name]
                seen.append((-1.0 - network.first, network.rest.clone()))
                for number, block in enumerate(network.visit(network.blocks)):
                    seen += read(block, network.first + number)
        if turn == 1:  # cut off in the middle of a last walk, then anew
            residency.enter("dit")
            residency.send_ahead("dit_low_noise")
            walk = networks["dit"].visit(networks["dit"].blocks)
            for number, block in zip(range(num_blocks // 2), walk, strict=False):
                seen += read(block, number)
            walk.close()
    assert num_wrong(seen) == 0
    residency.close()
    assert all(p.device.type == "cpu" for network in networks.values() for p in network.parameters())


@pytest.mark.usefixtures("lateness")
def test_offloaded_inputs_come_back_whole() -> None:
    size, num_blocks = 1 << 16, 8
    numbers = [torch.full((size,), float(i)).pin_memory() for i in range(num_blocks + 1)]
    noise = torch.full((size,), -7.0).to(CUDA)
    offload = CheckpointOffload()
    fresh: list[Tensor] = []
    seen: Seen = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, number: int) -> Tensor:
            ctx.save_for_backward(x)
            ctx.number = number
            return fresh[number + 1].clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
            (x,) = ctx.saved_tensors
            seen.append((float(ctx.number), x.clone()))
            del x
            for _ in range(3):  # takes memory that was let go, and writes to it
                torch.empty(size, device=CUDA).copy_(noise)
            return grad.clone(), None

    for step in range(4):
        fresh[:] = [tensor.to(CUDA) for tensor in numbers]
        y = fresh[0].clone().requires_grad_()
        with offload.hooks():
            for number in range(num_blocks):
                y = Keep.apply(y, number)
        if step != 2:
            torch.autograd.backward(y, torch.empty_like(y).copy_(noise))
        del y
    assert num_wrong(seen) == 0
    assert offload.counts.back > 0
    offload.close()


def fetches_into_a_slot_in_use(patch: pytest.MonkeyPatch) -> None:
    def fetch(self, target, source, start, stop, free):
        with torch.cuda.stream(self._stream):
            source.read_into(target, start, stop)
            return copiers._EventTransfer(self._stream.record_event())

    patch.setattr(copiers.StreamCopier, "fetch", fetch)


def computes_before_a_block_has_come(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copiers._EventTransfer, "wait", lambda self: None)


def reads_into_a_buffer_that_is_being_sent(patch: pytest.MonkeyPatch) -> None:
    carry = copiers.RingCopier._carry

    def careless(self, *given):
        self._busy = [copiers._nothing] * len(self._ring)
        return carry(self, *given)

    patch.setattr(copiers.RingCopier, "_carry", careless)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "late", "host"),
    [
        (fetches_into_a_slot_in_use, "compute-late", "pinned"),
        (computes_before_a_block_has_come, "copies-late", "pinned"),
        (computes_before_a_block_has_come, "copies-late", "ring"),
        (reads_into_a_buffer_that_is_being_sent, "copies-late", "ring"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wait_that_is_left_out_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], late: str, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above would fail: what they rely on is that a missing wait shows."""
    fault(monkeypatch)
    controls.delays(**LATE[late])
    assert num_wrong(streamed((6, 2, (), host), walks=6)) > 0

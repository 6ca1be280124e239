"""Networks follow their plans: whole, staying, streamed; and the way out when memory cannot be pinned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import MovedModelError, PinnedMemoryError
from diffsynth.vram_management import streaming
from diffsynth.vram_management.copiers import FlatSource
from diffsynth.vram_management.memory_plan import NetworkPlan
from diffsynth.vram_management.residency import Residency
from diffsynth.vram_management.visit import Visit, in_order

AWAY = torch.device("cpu:0")  # torch takes it for another device than cpu, and copies


class Network(nn.Module):
    host_tables = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.norm = nn.LayerNorm(8)
        self.visit: Visit = in_order
        self.requires_grad_(False)

    def forward(self) -> Tensor:
        x = self.table[:3]
        for block in self.visit(self.blocks):
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


def streamed(host: str = "pageable", resident: tuple[int, ...] = ()) -> NetworkPlan:
    return NetworkPlan(
        network="one", where="streamed", num_blocks=5, num_slots=2, host=host, resident_blocks=resident
    )  # type: ignore[arg-type]


def test_a_streamed_network_brings_the_rest_and_leaves_its_tables() -> None:
    network = Network()
    table, norm = network.table.data_ptr(), network.norm.weight.data_ptr()
    expected = network()
    residency = Residency({"one": network, "absent": None}, AWAY)
    residency.arrange({"one": streamed()})
    with residency.use("one"):
        assert network.table.data_ptr() == table and network.norm.weight.data_ptr() != norm
        assert torch.equal(network(), expected)
    with residency.use():
        assert network.norm.weight.data_ptr() == norm and network.visit is not None
    assert torch.equal(network(), expected), "at rest it computes from its resting weights"
    residency.close()
    assert torch.equal(network(), expected)


def test_who_stays_is_not_sent_to_rest() -> None:
    one, two = Network(), Network()
    residency = Residency({"one": one, "two": two}, AWAY)
    residency.arrange({"one": NetworkPlan(network="one", where="resident", num_blocks=5)})
    rest = one.norm.weight.data_ptr()
    residency.enter("one")
    away = one.norm.weight.data_ptr()
    assert away != rest
    residency.enter("two")
    assert one.norm.weight.data_ptr() == away
    residency.release()
    assert one.norm.weight.data_ptr() == rest


def test_memory_that_cannot_be_pinned_is_read_through_a_ring(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = streaming.host_buffer

    def refusing(num_bytes: int, gpu: torch.device | None) -> FlatSource:
        if gpu is not None:
            raise PinnedMemoryError("The system did not lock 1 MiB of memory for the GPU.")
        return given(num_bytes, None)

    monkeypatch.setattr(streaming, "host_buffer", refusing)
    network = Network()
    expected = network()
    residency = Residency({"one": network}, AWAY)
    with caplog.at_level("WARNING", logger="diffsynth"):
        residency.arrange({"one": streamed("pinned")})
    assert "did not lock" in caplog.text and "ring" in caplog.text
    with residency.use("one"):
        assert torch.equal(network(), expected)
    counts = residency.counts("one")
    assert counts is not None and counts.copies == 5 + 2
    residency.close()


def test_an_exception_while_entering_is_undone_by_the_next_phase() -> None:
    network = Network()
    expected = network()
    residency = Residency({"one": network}, AWAY)
    residency.arrange({"one": streamed()})
    with pytest.raises(KeyError), residency.use("one"):
        for _ in network.visit(network.blocks):
            raise KeyError("in the middle")
    residency.release()
    assert torch.equal(network(), expected)


def test_a_network_that_could_not_come_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    expected, norm = network(), network.norm.weight.data_ptr()
    residency = Residency({"one": network}, AWAY)
    residency.arrange({"one": streamed()})
    kept = network.blocks[2].weight.data
    network.blocks[2].weight.data = kept.clone()
    for _ in range(2):
        with pytest.raises(MovedModelError), residency.use("one"):
            pass
        assert network.norm.weight.data_ptr() == norm, "what had come went back"
    network.blocks[2].weight.data = kept
    with residency.use("one"):
        assert torch.equal(network(), expected)
    residency.close()

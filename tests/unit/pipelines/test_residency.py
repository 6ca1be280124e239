"""Networks that rest elsewhere visit the device for their phase and are never copied back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.vram_management.residency import Residency


def test_each_network_comes_in_once_in_the_order_of_its_phase(
    toy_pipe: WanVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[tuple[str, ...]] = []
    use = Residency.use

    @contextmanager
    def noted(self: Residency, *names: str) -> Iterator[None]:
        phases.append(names)
        with use(self, *names):
            yield

    monkeypatch.setattr(Residency, "use", noted)
    video = torch.rand(5, 3, 16, 32)
    toy_pipe(["a", "b"], input_video=video, denoising_strength=0.5, seed=0)
    assert phases == [("text_encoder",), ("vae",), ("dit", "dit_low_noise"), ("vae",)]


class Room:
    """A device made of bookkeeping: this machine may have no second one."""

    def __init__(self, *networks: nn.Module) -> None:
        self.resting = {id(t): t.data_ptr() for n in networks for t in n.parameters()}

    def is_resting(self, network: nn.Module) -> bool:
        return all(t.data_ptr() == self.resting[id(t)] for t in network.parameters())


@pytest.mark.gpu
def test_networks_visit_the_gpu_and_rest_where_they_were() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    room = Room(first, second)
    residency = Residency({"first": first, "second": second, "absent": None}, torch.device("cuda", 0))
    with residency.use("first", "absent"):
        assert first.weight.is_cuda and room.is_resting(second)
        first(torch.ones(1, 8, device="cuda"))
    assert first.weight.is_cuda, "it stays until another phase needs the room"
    with residency.use("second"):
        assert room.is_resting(first) and second.weight.is_cuda
    residency.release()
    assert room.is_resting(first) and room.is_resting(second)


def test_a_network_that_is_there_is_left_alone() -> None:
    network = nn.Linear(8, 8)
    room = Room(network)
    residency = Residency({"one": network}, torch.device("cpu"))
    with residency.use("one"):
        assert room.is_resting(network)
    with residency.use("other"):
        assert room.is_resting(network)

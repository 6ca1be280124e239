"""Networks that rest elsewhere visit the device for their phase and are never copied back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.vram_management.residency import Residency


def test_each_network_comes_in_once_in_the_order_of_its_phase(
    toy_pipe: WanVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[tuple[str, ...]] = []
    enter = Residency.enter

    def noted(self: Residency, *names: str) -> None:
        if phases[-1:] != [names]:
            phases.append(names)
        enter(self, *names)

    monkeypatch.setattr(Residency, "enter", noted)
    video = torch.rand(5, 3, 16, 32)
    toy_pipe(["a", "b"], input_video=video, denoising_strength=0.5, seed=0)
    assert phases == [("text_encoder",), ("vae",), ("dit",), ("vae",)]


class Rest:
    """Where weights lay when they were loaded."""

    def __init__(self, *networks: nn.Module) -> None:
        self.places = {id(t): t.data_ptr() for n in networks for t in n.parameters()}

    def holds(self, network: nn.Module) -> bool:
        return all(t.data_ptr() == self.places[id(t)] for t in network.parameters())


# torch takes cpu:0 for another device than cpu, and copies: a second device on every machine
AWAY = [pytest.param("cpu:0", id="cpu"), pytest.param("cuda:0", id="gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", AWAY)
def test_networks_visit_for_their_phase_and_rest_where_they_were(device: str) -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    rest = Rest(first, second)
    residency = Residency({"first": first, "second": second, "absent": None}, torch.device(device))
    with residency.use("first", "absent"):
        assert not rest.holds(first) and rest.holds(second)
        first(torch.ones(1, 8, device=device))
        visiting = first.weight.data_ptr()
    with residency.use("first"):
        assert first.weight.data_ptr() == visiting, "it stays until another phase needs the room"
    with residency.use("second"):
        assert rest.holds(first) and not rest.holds(second)
    residency.release()
    assert rest.holds(first) and rest.holds(second)


@pytest.mark.parametrize("device", AWAY)
def test_a_pipeline_of_resting_networks_gives_the_same_video(
    toy_pipe: WanVideoPipeline, toy_folder: Path, device: str
) -> None:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(toy_folder)
    rest = Rest(*manager.model)
    pipe = WanVideoPipeline.from_model_manager(manager, device=device)
    made = [pipe("a red circle", seed=seed, output_type="pt") for seed in (0, 1, 0)]
    assert torch.equal(made[0], made[2])
    # the same seed; float32 sums in the order of another device
    torch.testing.assert_close(made[0], toy_pipe("a red circle", seed=0, output_type="pt"), atol=1e-4, rtol=0)
    assert pipe.text_encoder is not None and pipe.vae is not None and pipe.dit is not None
    assert rest.holds(pipe.text_encoder) and rest.holds(pipe.dit) and not rest.holds(pipe.vae)


def test_an_error_leaves_networks_usable(toy_folder: Path) -> None:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(toy_folder)
    pipe = WanVideoPipeline.from_model_manager(manager, device="cpu:0")
    expected = pipe("a red circle", seed=0, output_type="pt")

    def fail(*_: object) -> None:
        raise RuntimeError("a callback of the user")

    with pytest.raises(RuntimeError, match="a callback of the user"):
        pipe("a red circle", seed=0, callback_on_step_end=fail)
    assert torch.equal(pipe("a red circle", seed=0, output_type="pt"), expected)


def test_a_network_that_is_there_is_left_alone() -> None:
    network = nn.Linear(8, 8)
    rest = Rest(network)
    residency = Residency({"one": network}, torch.device("cpu"))
    with residency.use("one"):
        assert rest.holds(network)
    with residency.use("other"):
        assert rest.holds(network)

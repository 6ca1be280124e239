"""Two streamed experts: who is on the device, what the switch waits for, what memory the second takes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.vram_management.residency import Residency
from tests.toys import TOY_DIT, write_toy_dit
from tests.unit.checkpoints.weights import write_sparse

NUM_LAYERS = 6
CALL = {"prompt_embeds": torch.ones(1, 4, 32), "negative_prompt_embeds": torch.zeros(1, 3, 32), "seed": 0}
CALL |= {"output_type": "latent", "sigmas": [1.0, 0.9, 0.6, 0.3]}  # two steps of each expert


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[WanVideoPipeline]:
    config = replace(TOY_DIT, num_layers=NUM_LAYERS)
    files = [
        write_toy_dit(tmp_path / f"{role}_noise_model" / "dit.safetensors", seed, config)
        for seed, role in enumerate(("high", "low"))
    ]
    manager = ModelManager(torch.float32, "cpu").load_models(files)
    made = WanVideoPipeline.from_model_manager(manager, device="cpu:0")  # torch takes it for another device
    yield made
    made.disable_vram_management()


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each expert that was brought in, with the copies that had to be asked for just then."""
    seen: list[tuple[str, int]] = []
    bring_in = Residency._bring_in

    def noted(self: Residency, name: str) -> None:
        counts = self.counts(name)
        before = 0 if counts is None else counts.copies
        bring_in(self, name)
        if counts is not None:
            seen.append((name, counts.copies - before))

    monkeypatch.setattr(Residency, "_bring_in", noted)
    return seen


def streamed_share(pipe: WanVideoPipeline, share: float) -> int:
    assert pipe.dit is not None
    return int(share * sum(p.numel() for p in pipe.dit.parameters()))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_low_noise_expert_is_there_when_its_turn_comes(
    pipe: WanVideoPipeline, arrivals: list[tuple[str, int]], share: float
) -> None:
    expected = pipe(**CALL)
    pipe.enable_vram_management(streamed_share(pipe, share))
    for _ in range(2):
        assert torch.equal(pipe(**CALL), expected)
        (first, copies), (second, waited_for) = arrivals
        assert (first, second) == ("dit", "dit_low_noise") and copies >= 2
        assert waited_for == 0, "its blocks had been asked for during the last step of the other"
        counts = pipe._residency.counts("dit_low_noise")
        assert counts is not None and counts.slots_made == 0, "it came into the slots of the other"
        pipe._residency.release()
        arrivals.clear()


def test_only_the_expert_in_use_is_on_the_device(pipe: WanVideoPipeline) -> None:
    pipe.enable_vram_management(0)
    networks = {"high": pipe.dit, "low": pipe.dit2}
    rest = {name: places(network) for name, network in networks.items()}
    away: list[list[str]] = []

    def look(*_: object) -> None:
        away.append([name for name, network in networks.items() if places(network) != rest[name]])

    pipe(**CALL, callback_on_step_end=look)
    assert away[0] == ["high"] and away[2:] == [["low"], ["low"]]
    # behind the last high-noise step the first blocks wait in slots, and no tensor stands for them yet
    assert away[1] == ["high"]


def places(network: nn.Module | None) -> list[int]:
    assert network is not None
    return [tensor.data_ptr() for tensor in network.parameters()]


def test_a_walk_that_begins_below_the_boundary_asks_for_the_low_noise_expert_only(
    pipe: WanVideoPipeline, arrivals: list[tuple[str, int]]
) -> None:
    pipe.enable_vram_management(0)
    pipe(**{**CALL, "sigmas": [0.6, 0.3]})
    assert [name for name, _ in arrivals] == ["dit_low_noise"]


def test_a_call_that_ends_before_the_switch_leaves_nothing_behind(pipe: WanVideoPipeline) -> None:
    expected = pipe(**CALL)
    pipe.enable_vram_management(0)

    def stop(pipe: WanVideoPipeline, step: int, *_: object) -> None:
        if step == 1:
            pipe.interrupt()

    def fail(pipe: WanVideoPipeline, step: int, *_: object) -> None:
        if step == 1:
            raise RuntimeError("a callback of the user")

    pipe(**CALL, callback_on_step_end=stop)
    assert torch.equal(pipe(**CALL), expected)
    with pytest.raises(RuntimeError, match="a callback of the user"):
        pipe(**CALL, callback_on_step_end=fail)
    assert torch.equal(pipe(**CALL), expected)


def test_one_ring_serves_both_experts_where_memory_is_short(pipe: WanVideoPipeline) -> None:
    expected = pipe(**CALL)
    pipe.enable_vram_management(0)
    assert pipe.memory_plan is not None
    assert any("Both experts rest in plain memory" in note for note in pipe.memory_plan.notes)
    pipe.enable_vram_management(0, ram_limit=0.7 * pipe.memory_plan.pageable_bytes / 2**30)
    plan = pipe.memory_plan
    assert [plan.networks[name].host for name in ("dit", "dit_low_noise")] == ["ring", "ring"]
    assert plan.networks["dit"].pinned_bytes > 0 == plan.networks["dit_low_noise"].pinned_bytes
    assert any("in their files, read through one pinned ring" in note for note in plan.notes)
    assert isinstance(expected, Tensor) and torch.equal(pipe(**CALL), expected)


LARGE = DiTConfig(
    dim=1024, in_dim=16, out_dim=16, ffn_dim=4096, num_layers=6, num_heads=8, freq_dim=32, text_dim=32,
    text_len=16,
)  # fmt: skip
MEASURE = """
import ctypes, gc, json, sys, torch
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was given back, and only kept for later, is nobody's
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def run(manager, sigmas):
    pipe = WanVideoPipeline.from_model_manager(manager)
    pipe.enable_vram_management(0, ram_limit=0.12)
    pipe(prompt_embeds=torch.ones(1, 4, 32), height=32, width=32, num_frames=1, cfg_scale=1.0, seed=0,
         output_type="latent", sigmas=sigmas, single_expert=len(manager.loaded) == 1)
    return pipe, anonymous(), [n.host for n in pipe.memory_plan.networks.values()]

manager = ModelManager(torch.bfloat16, "cpu").load_models([sys.argv[1]])
pipe, one, _ = run(manager, [1.0])
pipe.disable_vram_management()
del pipe
manager.load_models([sys.argv[2]])
_, two, hosts = run(manager, [1.0, 0.5])
print(json.dumps({"one": one, "two": two, "hosts": hosts}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or platform.libc_ver()[0] != "glibc", reason="Linux alone tells it"
)
def test_the_second_expert_takes_no_memory_of_its_own_behind_a_ring(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanDiT(LARGE).state_dict().items()}
    files = []
    for role in ("high", "low"):
        folder = tmp_path / f"{role}_noise_model"
        folder.mkdir()
        metadata = {"config": json.dumps(asdict(LARGE))}
        files.append(write_sparse(folder / "dit.safetensors", shapes, metadata=metadata))
    size = files[1].stat().st_size
    assert size > 200e6
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, check=True
    )
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["hosts"] == ["ring", "ring"]
    assert found["two"] - found["one"] < 0.05 * size, found

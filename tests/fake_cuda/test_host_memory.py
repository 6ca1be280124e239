"""Host memory is locked once and for the right GPU; where the system refuses, work goes on more slowly."""

from __future__ import annotations

import gc
import logging
import time

import pytest
import torch
from torch import nn

from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.training.resting import Resting
from diffsynth.vram_management.host_memory import lock_tensors, locked_buffer
from diffsynth.vram_management.memory_plan import NetworkPlan
from diffsynth.vram_management.residency import Residency
from diffsynth.vram_management.streaming import BlockStream
from tests.fake_cuda import controls
from tests.fake_cuda.test_streams import CUDA, Block, Network

MIB = 1 << 20
CALL = {"prompt": "a", "negative_prompt": "b", "seed": 0, "progress_bar_cmd": iter, "output_type": "latent"}


def toy_pipe(device: str = "cuda", **limits: object) -> WanVideoPipeline:
    manager = ModelManager(torch.bfloat16, "cpu").load_models(toy_files("t2v", num_layers=4))
    pipe = WanVideoPipeline.from_model_manager(manager, device=device)
    if limits:
        pipe.enable_vram_management(**limits)
    return pipe


def test_locked_memory_is_unlocked_with_its_last_tensor() -> None:
    before = controls.locked_bytes()
    buffer = locked_buffer(MIB, CUDA)
    part = buffer[:256].view(torch.float32)
    assert part.is_pinned() and controls.locked_bytes() == before + MIB
    del buffer
    gc.collect()
    assert controls.locked_bytes() == before + MIB
    del part
    gc.collect()
    assert controls.locked_bytes() == before


def test_a_stream_that_nobody_closes_is_unlocked_behind_its_last_copy() -> None:
    before = controls.locked_bytes()
    controls.delays(copies_us=3000)
    for host in ("pinned", "ring"):
        stream = BlockStream([Block(i) for i in range(4)], device=CUDA, host=host)
        stream.start()
        assert controls.locked_bytes() > before
        del stream
        end = time.monotonic() + 10
        while controls.locked_bytes() > before and time.monotonic() < end:  # a reader's thread ends its work
            gc.collect()
        assert controls.locked_bytes() == before


def test_blocks_are_locked_once_in_a_process() -> None:
    pipe = toy_pipe(num_persistent_param_in_dit=0)
    pipe(**CALL)
    before = controls.counts()
    pipe.disable_vram_management()
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    pipe(**CALL)
    assert (controls.counts() - before).locks == 0


def test_a_refused_lock_is_no_error_of_the_next_kernel(caplog: pytest.LogCaptureFixture) -> None:
    controls.lockable_memory(400_000)  # of six blocks two, and no ring after them
    network = Network(0, 6)
    residency = Residency({"dit": network}, CUDA)
    plan = NetworkPlan(network="dit", where="streamed", num_blocks=6, num_slots=2, host="pinned")
    with caplog.at_level(logging.WARNING, logger="diffsynth"):
        residency.arrange({"dit": plan})
        residency.enter("dit")
    assert "did not lock" in caplog.text and "ring" in caplog.text and "ulimit" not in caplog.text
    torch.zeros(4, device=CUDA).add_(1)
    for number, block in enumerate(network.visit(network.blocks)):
        assert (block.q.cpu() == 2.0 * number + 1).all()
    residency.close()


@pytest.mark.parametrize("lockable", [0, 300_000])
def test_a_generation_goes_on_where_nothing_or_little_is_locked(lockable: int) -> None:
    controls.lockable_memory(lockable)
    pipe = toy_pipe(num_persistent_param_in_dit=0)
    assert pipe(**CALL).shape[0] == 1


def test_idle_experts_take_as_much_locked_memory_as_they_have_bytes(tmp_path) -> None:
    experts = [[nn.Linear(1000, 700, bias=False).requires_grad_(False)] for _ in range(2)]
    weights = [expert[0].weight.data.clone() for expert in experts]
    before = controls.locked_bytes()
    resting = Resting(experts, CUDA, "ram", tmp_path)
    num_bytes = sum(weight.nbytes for weight in weights)
    assert num_bytes <= controls.locked_bytes() - before < num_bytes + 4096
    for number in (0, 1, 0):
        resting.bring_in(number)
        torch.cuda.synchronize()
        assert torch.equal(experts[number][0].weight.data.cpu(), weights[number])
        assert experts[1 - number][0].weight.is_pinned()


def test_tensors_keep_their_numbers_when_they_are_locked() -> None:
    tensors = [torch.randn(3, 5), torch.randn(4, 4).t(), torch.arange(7), torch.randn(0)]
    before = [tensor.clone() for tensor in tensors]
    lock_tensors(tensors, CUDA)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert tensors[0].is_pinned() and not tensors[1].is_pinned()  # a transposed one keeps its strides


def test_a_network_that_comes_again_comes_from_locked_memory() -> None:
    pipe = toy_pipe()
    spent = []
    for _ in range(3):
        before = controls.counts()
        pipe(**CALL)
        spent.append(controls.counts() - before)
    first, _, third = spent
    assert first.locks == 0, "one visit is not worth it"
    assert third.pageable_bytes < first.pageable_bytes / 10
    assert third.locks == 0
    found = pipe._residency.locked_bytes()  # the VAE has no visit here
    assert found == {
        name: sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
        for name, network in (("dit", pipe.dit), ("text_encoder", pipe.text_encoder))
    }
    assert "pinned host memory" in pipe.describe()


def test_limits_after_a_call_move_no_weights_back_to_the_host(caplog: pytest.LogCaptureFixture) -> None:
    pipe = toy_pipe()
    pipe(**CALL)
    weight = pipe.parts.vae.conv1.weight
    with caplog.at_level(logging.WARNING, logger="diffsynth"):
        pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert "were loaded onto the device" not in caplog.text
    assert weight.device.type == "cpu"


def test_a_limit_of_the_hosts_memory_locks_nothing_beside_its_plan() -> None:
    pipe = toy_pipe(num_persistent_param_in_dit=0, ram_limit=4.0)
    for _ in range(2):
        pipe(**CALL)
    before = controls.counts()
    pipe(**CALL)
    assert (controls.counts() - before).locks == 0


@pytest.mark.slow
@pytest.mark.fake_cuda(devices=2)
@pytest.mark.parametrize("limits", [{}, {"num_persistent_param_in_dit": 0}, {"vram_limit": "auto"}], ids=str)
def test_a_pipeline_of_the_second_gpu_leaves_the_first_alone(limits: dict[str, object]) -> None:
    pipe = toy_pipe("cuda:1", **limits)
    for _ in range(2):
        pipe(**CALL)
    del pipe
    gc.collect()
    assert controls.has_context(1) and not controls.has_context(0)


@pytest.mark.parametrize("limits", [{"num_persistent_param_in_dit": 0}, {"vram_limit": 0.6}], ids=str)
def test_what_is_locked_for_networks_that_come_again_is_what_the_plan_says(limits: dict[str, float]) -> None:
    pipe = toy_pipe(**limits)
    for _ in range(2):
        pipe(**{**CALL, "output_type": "pil"})
    assert pipe.memory_plan is not None
    planned = {name: network.locked_bytes for name, network in pipe.memory_plan.networks.items()}
    assert pipe._residency.locked_bytes() == {name: count for name, count in planned.items() if count}
    pipe.enable_vram_management(**limits, ram_limit=64)
    assert pipe.memory_plan.locked_bytes == 0

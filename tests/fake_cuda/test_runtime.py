"""The simulated runtime behaves as CUDA where the other tests of this folder rely on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fake_cuda import controls
from tests.fake_cuda.gpus import on_gpu

CUDA = torch.device("cuda", 0)
ELEMENTS = 1 << 16


def test_copies_are_asynchronous_and_in_the_order_of_their_stream() -> None:
    controls.delays(copies_us=20000)
    source = torch.ones(ELEMENTS).pin_memory()
    target = torch.zeros(ELEMENTS, device=CUDA)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(side):
        for value in (1.0, 2.0, 3.0):
            source.fill_(value)
            target.copy_(source, non_blocking=True)
            if value == 2.0:
                side.synchronize()
    assert not side.query()
    torch.cuda.current_stream().wait_event(side.record_event())
    assert (target.cpu() == 3.0).all()


def test_without_a_wait_another_stream_reads_what_was_there_before() -> None:
    before, source = torch.zeros(ELEMENTS), torch.ones(ELEMENTS).pin_memory()
    target = torch.empty(ELEMENTS, device=CUDA)
    controls.delays(copies_us=50000)
    side = torch.cuda.Stream(CUDA)
    seen = []
    for _ in range(8):
        target.copy_(before)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
        seen.append(bool((target.cpu() == 0).all()))
        side.synchronize()
    assert any(seen)


def test_memory_is_that_of_the_allocator() -> None:
    size = (1 << 30) + torch.cuda.memory_reserved()  # cuBLAS keeps memory from one test to the next
    controls.device_memory(size)
    held = torch.empty(900 << 20, dtype=torch.uint8, device=CUDA)
    assert torch.cuda.memory_allocated() >= held.nbytes
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        torch.empty(200 << 20, dtype=torch.uint8, device=CUDA)
    free, total = torch.cuda.mem_get_info()
    assert total == size and free < 200 << 20


def test_a_refused_call_leaves_its_error_to_the_next_kernel() -> None:
    controls.lockable_memory(0)
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    assert int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.zeros(4, device=CUDA).add_(1)
    torch.zeros(4, device=CUDA).add_(1)


def test_kernels_are_checked_dispatched_and_named(tmp_path: Path) -> None:
    x = torch.empty(8, 8, device=CUDA, dtype=torch.bfloat16)
    with controls.logged(tmp_path / "log") as rows:
        before = controls.counts()
        x @ x
        x.add_(1)
        spent = controls.counts() - before
    assert (spent.launches, spent.products, spent.syncs) == (2, 1, 0)
    assert [row[0] for row in rows] == ["product", "kernel"] and "elementwise" in rows[1][1]
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(8, 8)
    with pytest.raises(RuntimeError, match="dtype"):
        x @ x.float()


@pytest.mark.parametrize("capability", [90, *(on_gpu(capability=cc) for cc in (75, 120))])
def test_the_gpu_is_the_one_that_the_marker_names(capability: int) -> None:
    assert torch.cuda.get_device_capability() == divmod(capability, 10)


@pytest.mark.slow
@pytest.mark.fake_cuda(devices=2)
def test_a_gpu_is_touched_when_something_is_done_on_it() -> None:
    assert torch.cuda.device_count() == 2
    torch.empty(4, device="cuda:1")
    assert controls.has_context(1)

"""`enable_vram_management`: the same latents within less memory, and clear words where it cannot be."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import ArgumentError, BusyPipelineError, MemoryBudgetError, MovedModelError
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines import memory
from diffsynth.pipelines.memory import plan_call
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.vram_management.copiers import ThreadCopier
from diffsynth.vram_management.memory_plan import MemoryPlan
from tests.toys import TOY_DIT, TOY_TEXT_ENCODER, write_toy, write_toy_dit, write_toy_folder

NUM_LAYERS = 6
MIB = 1 / 1024  # in GiB


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough blocks in every network that there is something to stream."""
    from diffsynth.models.wan.text_encoder import WanTextEncoder

    folder = write_toy_folder(tmp_path_factory.mktemp("deep"))
    write_toy_dit(folder / "dit.safetensors", config=replace(TOY_DIT, num_layers=NUM_LAYERS))
    config = replace(TOY_TEXT_ENCODER, num_layers=4)
    write_toy(folder / "t5.safetensors", WanTextEncoder(config), config)
    return folder


@pytest.fixture
def pipe(deep_folder: Path) -> WanVideoPipeline:
    return load(deep_folder)


def load(*paths: Path) -> WanVideoPipeline:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(list(paths))
    return WanVideoPipeline.from_model_manager(manager)


def latents(pipe: WanVideoPipeline, seed: int = 0, **arguments: object) -> Tensor:
    made = pipe("a red circle", seed=seed, output_type="latent", **arguments)
    assert isinstance(made, Tensor)
    return made


def size_of(network: nn.Module | None) -> int:
    assert network is not None
    return sum(p.numel() for p in network.parameters())


def pointers(pipe: WanVideoPipeline) -> list[int]:
    return [p.data_ptr() for n in pipe.parts.networks().values() if n is not None for p in n.parameters()]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cfg_scale", [3.0, 1.0])
def test_streamed_equals_plain(pipe: WanVideoPipeline, share: float, cfg_scale: float) -> None:
    expected = latents(pipe, cfg_scale=cfg_scale)
    pipe.enable_vram_management(int(share * size_of(pipe.dit)))
    assert pipe.memory_plan is not None
    num_resident = len(pipe.memory_plan.networks["dit"].resident_blocks)
    if share < 1:
        assert (num_resident > 0) == (share > 0) and num_resident < NUM_LAYERS
    assert torch.equal(latents(pipe, cfg_scale=cfg_scale), expected)
    assert torch.equal(latents(pipe, cfg_scale=cfg_scale), expected), "and again"
    pipe.disable_vram_management()
    assert torch.equal(latents(pipe, cfg_scale=cfg_scale), expected)
    assert pipe.memory_plan is None


@pytest.mark.parametrize("interleaves", [False, True])
@pytest.mark.parametrize("keeps_keys", [False, True])
@pytest.mark.parametrize(("num_slots", "host"), [(2, "pageable"), (3, "pageable"), (2, "ring")])
def test_every_way_gives_the_same_latents(
    pipe: WanVideoPipeline,
    monkeypatch: pytest.MonkeyPatch,
    interleaves: bool,
    keeps_keys: bool,
    num_slots: int,
    host: str,
) -> None:
    expected = latents(pipe)

    def forced(*arguments: object) -> MemoryPlan:
        plan = plan_call(*arguments)  # type: ignore[arg-type]
        dit = replace(plan.networks["dit"], num_slots=num_slots, host=host)
        networks = {**plan.networks, "dit": dit}
        return replace(plan, networks=networks, interleaves_branches=interleaves, keeps_keys=keeps_keys)

    monkeypatch.setattr(memory, "plan_call", forced)
    pipe.enable_vram_management(0)
    assert torch.equal(latents(pipe), expected)
    counts = pipe._residency.counts("dit")
    assert counts is not None and counts.slots_made == num_slots
    passes = 2 * (1 if interleaves else 2)  # steps, and sides of the guidance one by one
    assert passes * NUM_LAYERS <= counts.copies <= passes * NUM_LAYERS + num_slots


def test_the_text_encoder_streams_where_it_does_not_fit(pipe: WanVideoPipeline) -> None:
    expected = latents(pipe)
    pipe.enable_vram_management(0)
    assert pipe.memory_plan is not None
    phases = {phase.name: phase.peak_bytes for phase in pipe.memory_plan.phases}
    if pipe.memory_plan.networks["text_encoder"].where != "streamed":
        pipe.enable_vram_management(0, vram_limit=(max(phases["dit"], phases["vae"]) + 2**12) / 2**30)
    assert pipe.memory_plan.networks["text_encoder"].where == "streamed", phases
    assert torch.equal(latents(pipe), expected)
    counts = pipe._residency.counts("text_encoder")
    assert counts is not None and counts.copies >= 4


def test_two_experts_stream_one_after_the_other(deep_folder: Path, tmp_path: Path) -> None:
    config = replace(TOY_DIT, num_layers=NUM_LAYERS)
    high = write_toy_dit(tmp_path / "high_noise_model" / "dit.safetensors", 1, config)
    low = write_toy_dit(tmp_path / "low_noise_model" / "dit.safetensors", 2, config)
    pipe = load(high, low, deep_folder / "t5.safetensors", deep_folder / "vae.safetensors")
    steps = {"num_inference_steps": 4, "switch_DiT_boundary": 0.6}
    expected = latents(pipe, **steps)
    pipe.enable_vram_management(0)
    assert torch.equal(latents(pipe, **steps), expected)
    for name in ("dit", "dit_low_noise"):
        counts = pipe._residency.counts(name)
        assert counts is not None and counts.copies >= NUM_LAYERS
    assert torch.equal(latents(pipe, **steps), expected)


def test_it_works_without_encoder_or_vae(deep_folder: Path) -> None:
    pipe = load(deep_folder / "dit.safetensors")
    embeds = torch.randn(1, 5, TOY_DIT.text_dim)
    arguments = {"prompt_embeds": embeds, "cfg_scale": 1.0, "seed": 0, "output_type": "latent"}
    expected = pipe(**arguments)
    pipe.enable_vram_management(0)
    assert torch.equal(pipe(**arguments), expected)


def test_a_limit_below_the_minimum_says_the_minimum(pipe: WanVideoPipeline) -> None:
    before = pointers(pipe)
    with pytest.raises(MemoryBudgetError, match=r"vram_limit is .* GiB") as caught:
        pipe.enable_vram_management(vram_limit=0.01 * MIB)
    assert "picture" in str(caught.value) or "leave" in str(caught.value)
    assert pointers(pipe) == before and pipe.memory_plan is None
    latents(pipe)


def test_a_call_that_does_not_fit_is_refused_and_the_next_one_works(pipe: WanVideoPipeline) -> None:
    expected = latents(pipe)
    pipe.enable_vram_management(0)
    assert pipe.memory_plan is not None
    pipe.enable_vram_management(vram_limit=pipe.memory_plan.peak_bytes / 2**30 * 1.05)
    with pytest.raises(MemoryBudgetError, match="vram_limit"):
        latents(pipe, height=512, width=512, num_frames=81)
    assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_persistent_param_in_dit": -1}, "num_persistent_param_in_dit is -1"),
        ({"num_persistent_param_in_dit": 1.5}, "num_persistent_param_in_dit is 1.5"),
        ({"num_persistent_param_in_dit": True}, "num_persistent_param_in_dit is True"),
        ({"num_persistent_param_in_dit": "7e9"}, "num_persistent_param_in_dit is '7e9'"),
        ({"num_persistent_param_in_dit": float("inf")}, "num_persistent_param_in_dit is inf"),
        ({"vram_limit": 0}, "vram_limit is 0"),
        ({"vram_limit": "12G"}, "vram_limit is '12G'"),
        ({"vram_limit": "auto"}, "device is cpu"),
        ({"ram_limit": -3.0}, "ram_limit is -3.0"),
    ],
)
def test_limits_that_cannot_work(pipe: WanVideoPipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pipe.enable_vram_management(**arguments)  # type: ignore[arg-type]
    latents(pipe)


def test_more_parameters_than_the_dit_has_stay_all_and_one_line_says_so(
    pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    expected = latents(pipe)
    pipe.enable_vram_management(num_persistent_param_in_dit=7e9)  # type: ignore[arg-type]
    assert torch.equal(latents(pipe), expected) and torch.equal(latents(pipe), expected)
    assert pipe.memory_plan is not None and pipe.memory_plan.networks["dit"].where != "streamed"
    told = [line for line in caplog.messages if "num_persistent_param_in_dit" in line]
    assert len(told) == 1 and "is 7000000000 and the DiT has" in told[0]


def test_enabled_twice_the_new_limit_holds(pipe: WanVideoPipeline) -> None:
    expected = latents(pipe)
    pipe.enable_vram_management(0)
    latents(pipe)
    rest = pointers(pipe)
    pipe.enable_vram_management(size_of(pipe.dit) // 2)
    assert pipe.memory_plan is not None and pipe.memory_plan.networks["dit"].resident_blocks
    assert torch.equal(latents(pipe), expected)
    pipe._residency.release()
    assert pointers(pipe) == rest, "the buffers of the first limit serve the second"


def test_without_a_limit_networks_come_as_a_whole(pipe: WanVideoPipeline) -> None:
    expected = latents(pipe)
    pipe.enable_vram_management()
    assert pipe.memory_plan is None
    assert torch.equal(latents(pipe), expected)


def test_a_model_moved_by_hand_is_told(pipe: WanVideoPipeline) -> None:
    pipe.enable_vram_management(0)
    expected = latents(pipe)
    assert pipe.dit is not None
    pipe._residency.release()
    pipe.dit.double()
    with pytest.raises(MovedModelError, match="disable_vram_management"):
        latents(pipe)
    pipe.dit.float()
    pipe.disable_vram_management()
    pipe.enable_vram_management(0)
    # the weights lie elsewhere now, and a CPU sums in another order there
    torch.testing.assert_close(latents(pipe), expected, atol=1e-4, rtol=0)


def test_an_error_in_mid_step_leaves_the_next_call_right(
    pipe: WanVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.enable_vram_management(0)
    expected = latents(pipe)
    block = pipe.parts.high.dit.blocks[3]  # type: ignore[union-attr]

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of a step")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="middle of a step") as held:
        patch.setattr(block, "forward", fail)
        latents(pipe)
    assert torch.equal(latents(pipe), expected)
    assert held.value.__traceback__ is not None  # held until here: its frames keep the broken walk


def test_a_second_thread_is_refused(pipe: WanVideoPipeline) -> None:
    pipe.enable_vram_management(0)
    expected = latents(pipe)
    caught: list[BaseException] = []

    def from_another_thread(*_: object) -> None:
        def call() -> None:
            try:
                latents(pipe)
            except BusyPipelineError as error:
                caught.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    made = latents(pipe, callback_on_step_end=from_another_thread)
    assert len(caught) == 2 and torch.equal(made, expected)


def test_copies_end_with_the_phase(pipe: WanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[ThreadCopier] = []
    closed: list[ThreadCopier] = []
    make, close = ThreadCopier.__init__, ThreadCopier.close

    def noted_make(self: ThreadCopier) -> None:
        opened.append(self)
        make(self)

    def noted_close(self: ThreadCopier) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(ThreadCopier, "__init__", noted_make)
    monkeypatch.setattr(ThreadCopier, "close", noted_close)
    pipe.enable_vram_management(0)
    pipe("a red circle", seed=0)  # the VAE's phase sends the DiT to rest
    assert opened and opened == closed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
class TestNothingGrows:
    """Resident memory of the process, after collection, stays within 1 %."""

    def test_over_generations(self, pipe: WanVideoPipeline) -> None:
        pipe.enable_vram_management(0)
        for index in range(20):
            pipe("a red circle", seed=0, output_type="pt", num_inference_steps=1)
            if index == 4:
                before = resident_bytes()
        assert resident_bytes() < before * 1.01

    def test_over_steps(self, pipe: WanVideoPipeline) -> None:
        pipe.enable_vram_management(0)
        sizes: dict[int, int] = {}

        def note(_: object, step: int, *__: object) -> None:
            if step in (20, 199):
                sizes[step] = resident_bytes()

        latents(pipe, num_inference_steps=200, callback_on_step_end=note, progress_bar_cmd=list)
        assert sizes[199] < sizes[20] * 1.01


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_plan_of_a_call_counts_an_encode_where_something_is_given(pipe: WanVideoPipeline) -> None:
    pipe.enable_vram_management(vram_limit=1)
    frames = torch.rand(5, 3, 32, 32)
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    for given in ({}, {"input_video": frames, "denoising_strength": 0.5}, {}):
        latents(pipe, **call, **given)
        assert pipe.memory_plan is not None
        names = [phase.name for phase in pipe.memory_plan.phases]
        assert names == ["text", *(["encode"] if given else []), "dit", "vae"]

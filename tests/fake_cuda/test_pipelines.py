"""Whole pipelines of every kind of toy model: text, pictures, DiT and VAE, in every arrangement of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffsynth.models.kinds import facts_of_kind
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.table import inputs_read
from diffsynth.models.toy import KINDS, toy_files
from diffsynth.ops.fp8 import FP8
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.fake_cuda import controls
from tests.fake_cuda.arrangements import read_through_a_ring
from tests.fake_cuda.gpus import on_gpu
from tests.model_inputs import ALONE, given

WITH_VAE22 = {"ti2v", "i2v-5b", "control-5b", "camera-5b"}
STREAMED = {"num_persistent_param_in_dit": 0}
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "streamed": {"limits": STREAMED, "sampler": "dpm++"},
    "resident": {"where": "cuda"},
    "visiting": {"videos": 2, "start": "video", "sampler": "euler"},
    "ring": {"is_ring": True},
    "fp8-widened": {"where": "cuda", "dtype": FP8},
    "fp8-multiplied": {"limits": STREAMED, "dtype": FP8, "fp8": "fp8"},
    "two-experts": {"limits": STREAMED, "experts": 2},
    "auto": {"limits": {"vram_limit": "auto"}},
}


def generate(
    kind: str, *, where: str = "cpu", device: str = "cuda", dtype: torch.dtype = torch.bfloat16,
    limits: dict[str, Any] | None = None, start: str = "noise", videos: int = 1, experts: int = 1,
    fp8: Any = None, sampler: str = "unipc", is_ring: bool = False,
) -> None:  # fmt: skip
    files = toy_files(kind, num_layers=4, num_experts=experts)
    where = device if where == "cuda" else where
    pipe = WanVideoPipeline.from_model_manager(
        ModelManager(dtype, where).load_models(files), torch_dtype=torch.bfloat16, device=device
    )
    if limits:
        pipe.enable_vram_management(**limits)
    if is_ring:
        read_through_a_ring(pipe)
    if fp8:
        pipe.choose_kernels(fp8_compute=fp8)
    names = [name for name in inputs_read(facts_of_kind(kind)) if name != ALONE]
    if start == "video":
        names = [name for name in names if name != "vace_reference_image"] + [ALONE]
    batch = {"num_videos_per_prompt": videos} if videos > 1 else {}
    size = (32, 64) if kind in WITH_VAE22 else (32, 48)
    made = pipe(
        prompt="a red ball", negative_prompt="bad", seed=0, sampler=sampler, progress_bar_cmd=iter,
        **given(names, *size), **batch,
    )  # fmt: skip
    assert len(made) == (videos if videos > 1 else 5)
    assert "attention" in pipe.describe()
    pipe.disable_vram_management()


def cases() -> list[Any]:
    """Every kind in every arrangement; a few of them in the default run."""
    default = {("t2v", "streamed"), ("vace", "resident"), ("i2v-5b", "two-experts")}
    return [
        pytest.param(
            kind, name, marks=() if (kind, name) in default else pytest.mark.slow, id=f"{kind}-{name}"
        )
        for kind in KINDS
        for name in ARRANGEMENTS
    ]


@pytest.mark.parametrize(("kind", "arrangement"), cases())
def test_every_kind_runs_in_every_arrangement(kind: str, arrangement: str) -> None:
    generate(kind, **ARRANGEMENTS[arrangement])


OTHERS = [*(on_gpu(capability=cc) for cc in (75, 80, 89, 100, 120))]


@pytest.mark.parametrize("capability", OTHERS)
@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
@pytest.mark.parametrize("arrangement", ["resident", "streamed", "fp8-widened"])
def test_other_gpus_run_too(capability: int, kind: str, arrangement: str) -> None:
    generate(kind, **ARRANGEMENTS[arrangement])


@pytest.mark.parametrize("arrangement", [on_gpu(name, devices=2) for name in ARRANGEMENTS], ids=ARRANGEMENTS)
def test_the_second_gpu_runs_alone(arrangement: str) -> None:
    generate("vace", device="cuda:1", **ARRANGEMENTS[arrangement])
    assert controls.has_context(1) and not controls.has_context(0)


@pytest.mark.parametrize("arranged", [pytest.param("visiting", marks=pytest.mark.slow), "streamed", "ring"])
def test_a_call_in_inference_mode_and_the_one_after_it(arranged: str) -> None:
    manager = ModelManager(torch.bfloat16, "cpu").load_models(toy_files("t2v", num_layers=4))
    pipe = WanVideoPipeline.from_model_manager(manager, device="cuda")
    if arranged == "streamed":
        pipe.enable_vram_management(**STREAMED)
    elif arranged == "ring":
        read_through_a_ring(pipe)
    call = {"prompt": "a", "negative_prompt": "b", "seed": 0, "progress_bar_cmd": iter}
    with torch.inference_mode():
        pipe(**call)
        pipe(**call)
    pipe(**call)

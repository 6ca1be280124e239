"""LoRAs of a pipeline: after it is made, on streamed and fp8 weights, by a schedule, for each expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.errors import ArgumentError, BusyPipelineError
from diffsynth.models.model_manager import ModelManager
from diffsynth.ops.fp8 import FP8
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.sampling.schedule import shifted_sigmas
from tests.toys import TOY_DIT, TOY_GENERATION, write_toy_dit, write_toy_folder
from tests.unit.lora.files import comfy_file, drawn, write

CONFIG = replace(TOY_DIT, num_layers=5)
D, H = CONFIG.dim, CONFIG.ffn_dim
SIZES = {
    "self_attn.q": (D, D),
    "cross_attn.k": (D, D),
    "cross_attn.v": (D, D),
    "ffn.0": (H, D),
    "ffn.2": (D, H),
}
AROUND = {"text_embedding.0": (D, CONFIG.text_dim), "head.head": (64, D)}
LAYERS = {**{f"blocks.{i}.{name}": size for i in range(5) for name, size in SIZES.items()}, **AROUND}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = write_toy_folder(tmp_path_factory.mktemp("pipe"))
    write_toy_dit(folder / "dit.safetensors", config=CONFIG)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return comfy_file(tmp_path_factory.mktemp("lora") / "style.safetensors", LAYERS)


@pytest.fixture(scope="module")
def small_tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    shapes = {"self_attn.norm_q.diff": (D,), "diff_m": (1, 6, D), "ffn.0.diff_b": (H,)}
    keys = {f"diffusion_model.blocks.{i}.{n}": drawn(*shape) for i in range(5) for n, shape in shapes.items()}
    return write(tmp_path_factory.mktemp("lora") / "small.safetensors", keys)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelManager, WanVideoPipeline]:
    manager = ModelManager(dtype, "cpu").load_models(folder)
    return manager, WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.float32)


def latents(pipe: WanVideoPipeline, **arguments: object) -> Tensor:
    made = pipe("a red circle", seed=0, output_type="latent", **arguments)
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("mode", ["fuse", "attach"])
@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_streamed_equals_resident_and_the_order_of_calls_does_not_matter(
    mode: str, dtype: torch.dtype, folder: Path, lora: Path, small_tensors: Path
) -> None:
    files = [lora, small_tensors]
    _, resident = load(folder, dtype)
    plain = latents(resident)
    resident.load_lora(files, mode=mode)  # type: ignore[arg-type]
    expected = latents(resident)
    assert not torch.equal(expected, plain)
    manager, pipe = load(folder, dtype)
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert torch.equal(latents(pipe), plain)
    manager.load_lora(files, mode=mode)  # type: ignore[arg-type]
    assert pipe.memory_plan is not None, "the limits hold again"
    assert torch.equal(latents(pipe), expected)
    pipe.set_lora("style", 0.5)
    half = latents(pipe)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), plain)
    pipe.set_lora("style", 0.5)
    pipe.set_lora("small", 1.0)
    assert torch.equal(latents(pipe), half) and not torch.equal(half, expected)
    pipe.unload_lora()
    assert torch.equal(latents(pipe), plain)
    pipe.disable_vram_management()
    assert torch.equal(latents(pipe), plain)


def test_a_schedule_acts_step_by_step_also_on_what_is_kept_between_steps(folder: Path, lora: Path) -> None:
    _, pipe = load(folder)
    plain, steps = latents(pipe, num_inference_steps=3), dict(num_inference_steps=3)
    pipe.load_lora(lora, mode="attach")
    pipe.set_lora("style", [0.0, 0.0, 0.0])
    assert torch.equal(latents(pipe, **steps), plain)
    pipe.set_lora("style", [1.0, 1.0, 1.0])
    whole = latents(pipe, **steps)
    pipe.set_lora("style", 1.0)
    assert torch.equal(latents(pipe, **steps), whole)

    after: list[Tensor] = []
    pipe.set_lora("style", [0.0, 1.0, 0.25])
    scheduled = latents(
        pipe,
        callback_on_step_end=lambda _, __, ___, tensors: after.append(tensors["latents"].clone()),
        **steps,
    )
    # Each step again in a call of its own, from the latents before it: nothing is kept between calls.
    sigmas = shifted_sigmas(3, shift=TOY_GENERATION["sigma_shift"]).tolist()
    for index, weight in ((1, 1.0), (2, 0.25)):
        pipe.set_lora("style", weight)
        alone = latents_from(pipe, after[index - 1], sigmas[index:])
        # Sigmas are rounded once more on this way.
        assert (alone - after[index]).norm() <= 1e-4 * alone.norm()
    assert torch.equal(after[2], scheduled) and not torch.allclose(scheduled, whole, atol=1e-3)
    with pytest.raises(ArgumentError, match="3 strengths and this call has 2 steps"):
        pipe.set_lora("style", [0.0, 1.0, 0.25])
        latents(pipe, num_inference_steps=2)


def test_a_callback_may_turn_an_attached_lora(folder: Path, lora: Path) -> None:
    _, pipe = load(folder)
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    pipe.load_lora(lora, mode="attach")
    pipe.set_lora("style", [1.0, 1.0, 0.25])
    expected = latents(pipe, num_inference_steps=3)
    pipe.set_lora("style", 1.0)

    def turn(pipe: WanVideoPipeline, step: int, *_: object) -> None:
        if step == 1:
            pipe.set_lora("style", 0.25)

    assert torch.equal(latents(pipe, num_inference_steps=3, callback_on_step_end=turn), expected)


def latents_from(pipe: WanVideoPipeline, start: Tensor, sigmas: list[float]) -> Tensor:
    """The latents after the first of these steps."""
    made = pipe(
        "a red circle", latents=start, sigmas=sigmas, output_type="latent",
        callback_on_step_end=lambda pipe, *_: pipe.interrupt(),
    )  # fmt: skip
    assert isinstance(made, Tensor)
    return made


def test_two_experts_read_a_schedule_and_their_own_files(folder: Path, lora: Path, tmp_path: Path) -> None:
    experts = [write_toy_dit(tmp_path / f"{r}_noise_model" / "dit.safetensors", seed=i, config=CONFIG)
               for i, r in enumerate(("high", "low"), 1)]  # fmt: skip
    manager = ModelManager(torch.float32, "cpu")
    manager.load_models([*experts, folder / "t5.safetensors", folder / "vae.safetensors"])
    pipe = WanVideoPipeline.from_model_manager(manager)
    plain = latents(pipe, num_inference_steps=3)
    pipe.load_lora(lora, name="low", network="low", mode="attach")
    low = latents(pipe, num_inference_steps=3)
    pipe.load_lora(lora, name="high", network="high", mode="attach")
    both = latents(pipe, num_inference_steps=3)
    assert not torch.equal(plain, low) and not torch.equal(low, both)
    pipe.unload_lora("low")
    pipe.unload_lora("high")
    assert torch.equal(latents(pipe, num_inference_steps=3), plain)


def test_a_lora_is_not_changed_in_the_middle_of_a_call(folder: Path, lora: Path) -> None:
    manager, pipe = load(folder)
    met: list[BaseException] = []

    def meddle(*_: object) -> None:
        with pytest.raises(BusyPipelineError) as error:
            manager.load_lora(lora)
        met.append(error.value)

    latents(pipe, callback_on_step_end=meddle)
    assert met and manager.loras.names == []


def test_a_pipeline_that_is_gone_is_not_asked(folder: Path, lora: Path) -> None:
    manager, pipe = load(folder)
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    latents(pipe)
    del pipe
    manager.load_lora(lora)
    assert manager.loras.names == ["style"]

"""What scripts of DiffSynth-Studio do to a pipeline between its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from diffsynth.errors import ArgumentError, ConfigurationError, LoRAError, MissingModelError
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.toys import TOY_DIT, write_toy_dit
from tests.unit.lora.files import comfy_file

PROMPT, NEGATIVE = "a red circle", "blue"


@pytest.fixture
def pipe(toy_folder: Path) -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")


def latents(pipe: WanVideoPipeline, **arguments: Any) -> Tensor:
    if "prompt_embeds" not in arguments:
        arguments |= {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    made = pipe(**arguments, seed=0, output_type="latent")
    assert isinstance(made, Tensor)
    return made


def test_encode_prompt_gives_what_a_call_reads(pipe: WanVideoPipeline) -> None:
    expected = latents(pipe)
    pipe.load_models_to_device(["text_encoder"])
    positive, negative = (
        pipe.encode_prompt(text, positive=is_positive)["context"]
        for text, is_positive in ((PROMPT, True), (NEGATIVE, False))
    )
    assert positive.shape == (1, TOY_DIT.text_len, TOY_DIT.text_dim) and not positive[0, -1].any()
    assert torch.equal(latents(pipe, prompt_embeds=positive, negative_prompt_embeds=negative), expected)
    assert pipe.encode_prompt(["a", "b c d"])["context"].shape[0] == 2
    pipe.text_encoder = None
    assert torch.equal(latents(pipe, prompt_embeds=positive, negative_prompt_embeds=negative), expected)
    with pytest.raises(MissingModelError, match="No text encoder is loaded"):
        pipe.encode_prompt(PROMPT)


def test_decode_video_gives_the_frames_of_a_call(pipe: WanVideoPipeline) -> None:
    frames = pipe(PROMPT, NEGATIVE, seed=0)
    decoded = pipe.decode_video(latents(pipe), tiled=False)
    assert decoded.shape == (1, 3, 5, 16, 32) and decoded.abs().max() <= 1.0
    assert pipe.tensor2video(decoded[0]) == frames
    again = pipe.encode_video(frames, tiled=False)
    assert again.shape == latents(pipe).shape
    assert torch.equal(again, pipe.encode_video(frames, tile_size=(8, 8), tile_stride=(4, 4))), "one tile"


def test_a_loop_of_ones_own_with_the_scheduler_gives_the_latents_of_a_call(pipe: WanVideoPipeline) -> None:
    expected = latents(pipe, num_inference_steps=3, cfg_scale=1.0)
    shown = pipe.scheduler.timesteps
    pipe.scheduler.set_timesteps(3, denoising_strength=1.0, shift=3.0)
    assert torch.equal(pipe.scheduler.timesteps, shown)
    x = pipe.generate_noise(expected.shape, seed=0)
    dit: Any = pipe.denoising_model()
    with pipe.encoding("text_encoder") as session:
        sides = session.conditions({"prompt": PROMPT, "cfg_scale": 1.0})
    with torch.no_grad():
        branch = dit.prepare(sides.positive)
        for timestep in pipe.scheduler.timesteps:
            [velocity] = dit(x, timestep[None], [branch])
            x = pipe.scheduler.step(velocity, timestep, x)
    assert (x - expected).abs().max() < 1e-5
    noise = torch.ones(1)
    assert pipe.scheduler.add_noise(torch.zeros(1), noise, pipe.scheduler.timesteps[0]) == 1.0
    assert pipe.scheduler.training_target(torch.zeros(1), noise, 5) == 1.0


def test_networks_come_to_the_device_by_v1s_names(pipe: WanVideoPipeline) -> None:
    expected = latents(pipe)
    for names in (["vae"], ["dit", "motion_controller"], ["dit2", "vace"], []):
        pipe.load_models_to_device(names)
    with pytest.raises(ArgumentError, match="names 'unet'; known: dit, "):
        pipe.load_models_to_device(["unet"])
    pipe.enable_cpu_offload()
    pipe.device = "cpu"  # type: ignore[assignment]
    assert pipe.to("cpu") is pipe and torch.equal(latents(pipe), expected)
    for device, what in (("foo", "device is 'foo'; give"), (5.0, "device is 5.0"), ("cuda:93", "no GPU")):
        if what == "no GPU" and torch.cuda.is_available():
            continue
        with pytest.raises(ArgumentError, match=what):
            pipe.device = device  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="would change the weights' dtype"):
        pipe.to(torch.float16)  # type: ignore[arg-type]
    assert torch.equal(latents(pipe), expected)


class Wrapped(nn.Module):
    """What torch.compile returns, without its compiler, which needs a minute here."""

    def __init__(self, network: nn.Module | None) -> None:
        super().__init__()
        self._orig_mod, self.calls = network, 0

    def __getattr__(self, name: str) -> Any:
        return self._modules["_orig_mod"] if name == "_orig_mod" else getattr(self._orig_mod, name)

    def __len__(self) -> int:
        raise TypeError("the network has no length")

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        return self._orig_mod(*arguments, **named)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 0], ids=["resident", "streamed"])
def test_a_dit_that_compiles_gives_the_same(limit: int | None, pipe: WanVideoPipeline) -> None:
    expected, graphs = latents(pipe), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    if limit is not None:
        pipe.enable_vram_management(num_persistent_param_in_dit=limit)
    pipe.dit = torch.compile(pipe.dit, backend=backend)
    assert torch.equal(latents(pipe), expected) and graphs
    graphs.clear()
    torch._dynamo.reset()


def test_what_torch_compile_returns_is_called_in_place_of_the_network(
    pipe: WanVideoPipeline, tmp_path: Path
) -> None:
    expected, plain = latents(pipe, cache_text=tmp_path), (pipe.dit, pipe.text_encoder, pipe.vae)
    pipe.dit, pipe.text_encoder, pipe.vae = Wrapped(pipe.dit), Wrapped(pipe.text_encoder), Wrapped(pipe.vae)
    assert isinstance(pipe.dit, Wrapped) and isinstance(pipe.text_encoder, Wrapped)
    assert pipe.vae is plain[2], "nothing calls its forward"
    for limit in (None, 0):
        pipe.enable_vram_management(limit)
        pipe.dit.calls = pipe.text_encoder.calls = 0
        assert torch.equal(latents(pipe), expected)
        assert (pipe.dit.calls, pipe.text_encoder.calls) == (2, 2)
        assert torch.equal(latents(pipe, cache_text=tmp_path), expected)
        assert pipe.text_encoder.calls == 2, "to the cache it is the same encoder"
    pipe.dit = plain[0]
    assert pipe.dit is plain[0] and torch.equal(latents(pipe), expected)


def test_another_dit_of_the_same_sizes_takes_its_place(pipe: WanVideoPipeline, tmp_path: Path) -> None:
    other_file = write_toy_dit(tmp_path / "other.safetensors", seed=7)
    manager = ModelManager(torch.float32, "cpu").load_models([other_file])
    plain, other = latents(pipe), manager.fetch_model("wan_video_dit")
    pipe.dit = other
    replaced = latents(pipe)
    assert not torch.equal(replaced, plain)
    lora = comfy_file(tmp_path / "style.safetensors", {"blocks.0.self_attn.q": (TOY_DIT.dim, TOY_DIT.dim)})
    with pytest.raises(LoRAError, match="no manager holds a DiT"):
        pipe.load_lora(lora)
    manager.load_lora(lora)
    assert not torch.equal(latents(pipe), replaced)


def test_what_cannot_take_a_place_is_told_and_nothing_changes(pipe: WanVideoPipeline, tmp_path: Path) -> None:
    expected = latents(pipe)
    wide = write_toy_dit(
        tmp_path / "wide.safetensors", config=TOY_DIT.__class__(**{**vars_of(TOY_DIT), "dim": 96})
    )
    other = ModelManager(torch.float32, "cpu").load_models([wide]).fetch_model("wan_video_dit")
    for value, words in (
        (None, "cannot be taken away"), (5, "pipe.dit is 5"), (nn.Linear(2, 2), "is a Linear"),
        (other, "has other sizes"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=words):
            pipe.dit = value  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match=r"pipe\.vae is a WanDiT; give a CausalVAE"):
        pipe.vae = pipe.dit
    with pytest.raises(ArgumentError, match="cannot be added"):
        pipe.dit2 = pipe.dit
    vae22 = WanVideoPipeline.from_pretrained(ti2v_vae(), device="cpu").vae
    with pytest.raises(ConfigurationError, match="48 latent channels"):
        pipe.vae = vae22
    assert torch.equal(latents(pipe), expected)


def vars_of(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def ti2v_vae() -> list[str]:
    from diffsynth.models.toy import toy_files

    return [file for file in toy_files("ti2v") if file.endswith("vae.safetensors")]


@pytest.mark.distributed
def test_a_dit_that_is_cut_over_devices_is_one_true_sentence(pipe: WanVideoPipeline, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(ArgumentError, match=r"tensor parallelism.* is not in this version"):
            pipe.dit = parallelize_module(pipe.dit, mesh, {"text_embedding.0": ColwiseParallel()})
    finally:
        torch.distributed.destroy_process_group()


def test_a_lora_for_one_network_goes_there_alone(two_experts: WanVideoPipeline, tmp_path: Path) -> None:
    lora = comfy_file(tmp_path / "style.safetensors", {"blocks.0.self_attn.q": (TOY_DIT.dim, TOY_DIT.dim)})
    pipe = two_experts
    states = [
        {n: t.clone() for n, t in d.state_dict().items()} for d in (pipe.dit, pipe.dit2) if d is not None
    ]
    pipe.load_lora(pipe.dit2, str(lora), alpha=0.5)
    changed = [
        [n for n, t in dit.state_dict().items() if not torch.equal(t, before[n])]
        for dit, before in zip((pipe.dit, pipe.dit2), states, strict=True) if dit is not None
    ]  # fmt: skip
    assert changed == [[], ["blocks.0.self_attn.q.weight"]]
    pipe.clear_lora()
    pipe.load_lora(pipe.dit, lora, 0.5, hotload=True)
    assert pipe.parts.loras.describe() and "attached to" in pipe.parts.loras.describe()[0]
    pipe.clear_lora()
    for call, words in (
        (lambda: pipe.load_lora(nn.Linear(2, 2), lora), "is no network of this pipeline"),
        (lambda: pipe.load_lora(pipe.dit, lora, alpha=2.0, lora_config=lora), "give one of them"),
        (lambda: pipe.load_lora(lora, 0.5, alpha=2.0), "give one of them"),
        (lambda: pipe.load_lora(pipe.dit), "There is no LoRA"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


def test_names_of_the_unit_pipeline_say_what_stands_in_their_place(pipe: WanVideoPipeline) -> None:
    with pytest.raises(AttributeError, match=r"'units': .*add_a_variant.md"):
        _ = pipe.units
    with pytest.raises(AttributeError, match="WanVideoPipeline has no 'vea'"):
        _ = pipe.vea
    assert not hasattr(pipe, "model_fn")

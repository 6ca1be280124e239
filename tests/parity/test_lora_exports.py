"""A LoRA that was trained here gives the same latents in diffusers and in ours, from every file of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.full_size import diffusers_twin
from diffsynth.lora.dialects import DIALECTS, write_loras
from diffsynth.lora.formats import open_loras
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import DIT, GENERATION
from diffsynth.models.wan.dit import WanDiT
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.training.processes import Ranks
from diffsynth.training.run import Run, train
from diffsynth.training.tuning import DEFAULT_TARGETS
from tests.golden_recipe import recipe_input
from tests.parity.test_peers_images import assert_near, grid
from tests.unit.training.toy_runs import config_of, toy_settings, trained_tensors

RANK, ALPHA = 4, 2.0  # they differ: a reader that overlooks alpha is twice as strong
SIZE = {name: GENERATION[name] for name in ("height", "width", "num_frames")}
LATENT_SIZE, TEXT_SIZE = (1, 16, 2, 4, 6), (1, 64, 32)
GUIDANCE, NUM_STEPS = 3.0, 3
CLEAR = 1e-2  # relative L2; a hundred times what counts as equal
LAYERS = tuple(
    f"blocks.{block}.{layer}"
    for block in range(int(str(DIT["num_layers"])))
    for layer in (*(f"{kind}_attn.{n}" for kind in ("self", "cross") for n in "qkvo"), "ffn.0", "ffn.2")
)
TWIN_SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 16, "out_channels": 16,
    **{name: DIT[name] for name in ("num_layers", "ffn_dim", "text_dim", "freq_dim")},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one training left: the network in memory and every file of it."""

    network: WanDiT  # as it stood after the last step, factors beside its layers
    files: dict[str, Path]  # the four exports by dialect, "ckpt", and "converted" from it for diffusers
    state: dict[str, Tensor]  # the trained tensors
    base: list[str]  # files of the DiT and of the VAE, untouched


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Four equal runs, one for each export format."""
    folder = tmp_path_factory.mktemp("toy")
    settings = toy_settings(folder)
    files, states, network = {}, [], None
    for export_format in DIALECTS:
        config = config_of(
            settings, folder / export_format, tune={"rank": RANK, "alpha": ALPHA},
            optimizer={"name": "adamw", "learning_rate": 0.05},
            run={"steps": 6, "export_format": export_format},
        )  # fmt: skip
        assert config.tune.targets == DEFAULT_TARGETS
        if network is None:
            run = Run(config, torch.device("cpu"), Ranks.of(config, torch.device("cpu")))
            report, network = run.fit(), run.module.learners[0].denoiser.dit
        else:
            report = train(config)
        assert report.export is not None and report.checkpoint is not None
        files[export_format], files["ckpt"] = report.export, report.checkpoint
        states.append(trained_tensors(report))
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    files["converted"] = folder / "converted.safetensors"
    write_loras(files["converted"], open_loras(files["ckpt"]), "diffusers")
    assert isinstance(network, WanDiT)
    base = [*settings["model"]["dit"], settings["model"]["vae"]]
    return Trained(network=network, files=files, state=states[0], base=base)


def scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def texts() -> dict[str, Tensor]:
    rows = {name: recipe_input(name, TEXT_SIZE) for name in ("prompt_embeds", "negative_prompt_embeds")}
    for name, length in (("prompt_embeds", 9), ("negative_prompt_embeds", 4)):
        rows[name][:, length:] = 0.0  # as both pipelines pad
    return rows


def our_pipeline(trained: Trained) -> WanVideoPipeline:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(trained.base)
    return WanVideoPipeline.from_model_manager(manager)


def our_latents(pipe: WanVideoPipeline) -> Tensor:
    latents = pipe(
        **SIZE, cfg_scale=GUIDANCE, sampler="unipc", latents=recipe_input("noise", LATENT_SIZE),
        output_type="latent", **grid(scheduler(), NUM_STEPS), **texts(),
    )  # fmt: skip
    assert isinstance(latents, Tensor)
    return latents


def diffusers_latents(trained: Trained, path: Path | None) -> Tensor:
    """Of diffusers' pipeline on the base weights, with the LoRA of a file."""
    from diffusers import WanPipeline

    dit = our_pipeline(trained).dit
    assert dit is not None
    peer = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler(),
        transformer=diffusers_twin(dit, "dit-1.3b", TWIN_SIZES),
    )  # fmt: skip
    peer.set_progress_bar_config(disable=True)
    if path is not None:
        peer.load_lora_weights(str(path.parent), weight_name=path.name)
    latents: Tensor = peer(
        **SIZE, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE, output_type="latent",
        latents=recipe_input("noise", LATENT_SIZE), **texts(),
    ).frames  # fmt: skip
    return latents


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def base_latents(trained: Trained) -> Tensor:
    """Of ours without any LoRA; diffusers' are the same."""
    latents = our_latents(our_pipeline(trained))
    assert_near(latents, diffusers_latents(trained, None))
    return latents


@pytest.fixture(scope="module")
def trained_latents(trained: Trained, base_latents: Tensor) -> Tensor:
    """Of the network that was trained, as it lies in memory; far from those of the base."""
    pipe = our_pipeline(trained)
    assert pipe.parts.high is not None
    pipe.parts.high = replace(pipe.parts.high, dit=trained.network)
    latents = our_latents(pipe)
    assert distance(latents, base_latents) > CLEAR
    return latents


@pytest.mark.parametrize("file", ["comfy", "diffusers", "kohya", "converted"])
def test_diffusers_gives_our_latents_with_our_lora(
    file: str, trained: Trained, trained_latents: Tensor
) -> None:
    theirs = diffusers_latents(trained, trained.files[file])
    assert_near(theirs, trained_latents)
    pipe = our_pipeline(trained)
    pipe.load_lora(trained.files[file], mode="attach")
    assert_near(our_latents(pipe), theirs)


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("file", [*DIALECTS, "ckpt"])
def test_every_file_gives_the_latents_of_the_trained_network(
    file: str, mode: Any, trained: Trained, trained_latents: Tensor
) -> None:
    pipe = our_pipeline(trained)
    [report] = pipe.load_lora(trained.files[file], mode=mode)
    assert list(report.fitted.values()) == [len(LAYERS)] and not report.missing
    assert_near(our_latents(pipe), trained_latents)


def test_trained_network_is_the_base_and_alpha_over_rank_times_the_product(
    trained: Trained, trained_latents: Tensor
) -> None:
    assert_near(our_latents(with_product(trained, ALPHA / RANK)), trained_latents)
    # what a reader without alpha would give
    assert distance(our_latents(with_product(trained, 1.0)), trained_latents) > CLEAR


def with_product(trained: Trained, scale: float) -> WanVideoPipeline:
    pipe = our_pipeline(trained)
    assert isinstance(pipe.dit, nn.Module)
    assert set(trained.state) == {f"{name}.lora_{ab}.default.weight" for name in LAYERS for ab in "AB"}
    with torch.no_grad():
        for name in LAYERS:
            down, up = (trained.state[f"{name}.lora_{ab}.default.weight"] for ab in "AB")
            pipe.dit.get_parameter(f"{name}.weight").add_(up @ down, alpha=scale)
    return pipe


def test_diffusers_export_carries_alpha_in_its_header_and_in_no_key(trained: Trained) -> None:
    with safe_open(trained.files["diffusers"], "pt") as file:
        names, told = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    assert len(names) == 2 * len(LAYERS)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (RANK, ALPHA)
    modules = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in names}
    assert set(told["transformer.target_modules"]) == modules


@pytest.mark.parametrize(
    ("dialect", "name_of"),
    [
        pytest.param("comfy", lambda layer: f"diffusion_model.{layer}", id="comfy"),
        pytest.param("kohya", lambda layer: f"lora_unet_{layer.replace('.', '_')}", id="kohya"),
    ],
)
def test_comfy_and_kohya_exports_carry_alpha_beside_every_layer(
    dialect: str, name_of: Callable[[str], str], trained: Trained
) -> None:
    with safe_open(trained.files[dialect], "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        alphas = {name: float(file.get_tensor(name)) for name in names if name.endswith(".alpha")}
    assert alphas == {f"{name_of(layer)}.alpha": ALPHA for layer in LAYERS}
    assert len(names) == 3 * len(LAYERS)
    assert "lora_adapter_metadata" not in metadata

"""Files as other tools write them: ComfyUI all-in-one, checkpoints of distillation, wrapped names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.errors import CheckpointError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder

VOCABULARY = tiny_folder() / "google" / "umt5-xxl" / "spiece.model"


def load(*paths: Path | str) -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(list(paths), torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    """The toy's files by their name; each tells its own defaults."""
    return {Path(file).stem: Path(file) for file in toy_files("t2v")}


def made(pipe: WanVideoPipeline) -> Tensor:
    latents = pipe("a red circle", height=32, width=48, num_frames=5, num_inference_steps=2, cfg_scale=3.0,
                   seed=0, output_type="latent")  # fmt: skip
    assert isinstance(latents, Tensor)
    return latents


@pytest.mark.parametrize(
    "place", ["text_encoders.", "text_encoders.umt5xxl.", "text_encoders.umt5xxl.transformer."]
)
def test_an_all_in_one_file_of_comfyui_brings_its_tokenizer(
    place: str, files: dict[str, Path], tmp_path: Path
) -> None:
    prefixes = {"dit": "model.diffusion_model.", "t5": "text_encoders.umt5xxl.transformer.", "vae": "vae."}
    tensors = {
        f"{prefix}{name}": tensor
        for part, prefix in prefixes.items()
        for name, tensor in load_file(files[part]).items()
    }
    tensors[f"{place}spiece_model"] = torch.frombuffer(bytearray(VOCABULARY.read_bytes()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "all.safetensors", dict(Checkpoint.open(files["dit"]).metadata))
    assert torch.equal(made(load(tmp_path / "all.safetensors")), made(load(*files.values())))


def _wrapped(name: str) -> str:
    """As FSDP around a model and around each block names it."""
    head, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    own = f"{head}.{index}._fsdp_wrapped_module.{rest}" if head == "blocks" else name
    return f"model._fsdp_wrapped_module.{own}"


def test_a_checkpoint_of_self_forcing_is_its_averaged_generator(
    files: dict[str, Path], tmp_path: Path
) -> None:
    weights = load_file(files["dit"])
    raw = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    averaged = {_wrapped(name): tensor for name, tensor in weights.items()}
    torch.save({"generator": raw, "generator_ema": averaged, "critic": raw, "step": 600}, tmp_path / "sf.pt")
    (tmp_path / "sf.json").write_text(Checkpoint.open(files["dit"]).metadata["config"])
    assert torch.equal(made(load(tmp_path / "sf.pt", files["t5"], files["vae"])), made(load(*files.values())))


def test_a_tensor_with_and_without_a_wrapper_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(files["dit"])
    twice = {
        **weights,
        "blocks.0._orig_mod.self_attn.q.weight": weights["blocks.0.self_attn.q.weight"].clone(),
    }
    save_file(twice, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match="holds a tensor twice: with and without the name of a wrapper"):
        ModelManager(None, "cpu").load_models([tmp_path / "dit.safetensors"])


def test_both_stages_of_ai_toolkit_go_to_their_experts(tmp_path: Path) -> None:
    pipe = load(*toy_files("t2v", num_experts=2))
    layer, tensors = "blocks.0.self_attn.q", {}
    for stage, value in ((1, 0.1), (2, 0.2)):
        start = f"diffusion_model.transformer_{stage}.{layer}"
        tensors[f"{start}.lora_A.weight"] = torch.full((1, 48), value)
        tensors[f"{start}.lora_B.weight"] = torch.ones(48, 1)
    save_file(tensors, tmp_path / "both.safetensors")
    experts = [pipe.dit, pipe.dit2]
    before = [expert.get_parameter(f"{layer}.weight").clone() for expert in experts]  # type: ignore[union-attr]
    pipe.load_lora(tmp_path / "both.safetensors")
    for expert, old, value in zip(experts, before, (0.1, 0.2), strict=True):
        change = expert.get_parameter(f"{layer}.weight") - old  # type: ignore[union-attr]
        torch.testing.assert_close(change, torch.full((48, 48), value))

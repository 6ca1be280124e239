"""What cannot be loaded is told before anything is built; what is passed over is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.errors import (
    ArgumentError,
    CheckpointNotFoundError,
    ConfigurationError,
    IncompleteCheckpointError,
    LoRAFileError,
    MissingShardError,
    UnknownCheckpointError,
    UnsupportedModelError,
)
from tests.unit.checkpoints.weights import manifests, toy_dit, write_sparse
from tests.unit.models.toy_folders import (
    DIT,
    HEADS,
    TEXT_ENCODER,
    VAE,
    all_three,
    cpu,
    write_official_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_official_folder(tmp_path)


def test_nothing_is_loaded_when_one_path_is_wrong(folder: Path) -> None:
    manager = cpu()
    with pytest.raises(CheckpointNotFoundError, match=r"Did you mean 'Wan2\.1_VAE\.pth'"):
        manager.load_models([*all_three(folder)[:2], folder / "Wan2.1_VEA.pth"])
    save_file({"w": torch.zeros(3)}, folder / "what.safetensors")
    with pytest.raises(UnknownCheckpointError, match=r"what\.safetensors holds 1 tensors"):
        manager.load_models([folder / "Wan2.1_VAE.pth", folder / "what.safetensors"])
    assert manager.loaded == []


def test_a_missing_shard_stops_the_loading(folder: Path) -> None:
    all_three(folder)[0][1].unlink()
    with pytest.raises(MissingShardError, match=r"1 of 3 missing.*00002-of-00003"):
        cpu().load_models(folder)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    weights = toy_dit().state_dict()
    del weights["blocks.2.ffn.2.bias"]
    save_file(weights, tmp_path / "dit.safetensors", metadata=HEADS)
    with pytest.raises(
        IncompleteCheckpointError, match=r"1 of the file's are missing: blocks\.2\.ffn\.2\.bias"
    ):
        cpu().load_models(tmp_path)
    weights["blocks.2.ffn.2.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "dit.safetensors", metadata=HEADS)
    with pytest.raises(IncompleteCheckpointError, match=r"blocks\.2\.ffn\.2\.bias \(5,\) instead of \(96,\)"):
        cpu().load_models(tmp_path)


def test_missing_heads_are_named(tmp_path: Path) -> None:
    save_file(toy_dit().state_dict(), tmp_path / "dit.safetensors")
    with pytest.raises(ConfigurationError, match="num_heads is missing"):
        cpu().load_models(tmp_path)


def test_a_lora_is_sent_to_load_lora(folder: Path) -> None:
    save_file({"blocks.0.self_attn.q.lora_A.default.weight": torch.zeros(4, 96)}, folder / "lora.safetensors")
    with pytest.raises(LoRAFileError, match="load_lora"):
        cpu().load_models([folder / "lora.safetensors"])


def test_what_lies_about_in_a_folder_is_passed_over_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"blocks.0.self_attn.q.lora_A.default.weight": torch.zeros(4, 96)}, folder / "lora.safetensors")
    save_file({"w": torch.zeros(3)}, folder / "what.safetensors")
    assert len(cpu().load_models(folder).model) == 3
    assert caplog.text.count("Passed over") == 2
    (folder / "only").mkdir()
    save_file({"w": torch.zeros(3)}, folder / "only" / "what.safetensors")
    with pytest.raises(UnknownCheckpointError):
        cpu().load_models(folder / "only")


def unbuilt(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever this version builds, pretend that it does not build this one."""
    from dataclasses import replace

    from diffsynth.models import model_manager

    rows = [replace(row, module=None) if row.name == name else row for row in model_manager.ARCHITECTURES]
    monkeypatch.setattr(model_manager, "ARCHITECTURES", tuple(rows))


@pytest.mark.parametrize(
    "model", ["longcat_video", "wan_dancer_14b", "video_as_prompt_wan2.1_14b", "wan2.2_animate_2_14b"]
)
def test_a_network_that_is_not_built_is_named(model: str, tmp_path: Path) -> None:
    write_sparse(tmp_path / "model.safetensors", manifests()[model])
    with pytest.raises(UnsupportedModelError, match="It is recognised, but not built by this version"):
        cpu(None).load_models(tmp_path)


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("wan2.1_vace_1.3b", "wan_video_vace"),
        ("wan2.1_fun_v1.1_1.3b_control", "wan_video_reference_adapter"),
        ("wan2.1_fun_v1.1_1.3b_control_camera", "wan_video_camera_adapter"),
        ("wan2.2_s2v_14b", "wan_video_speech_adapter"),
        ("wan2.2_animate_14b", "wan_video_animate_adapter"),
    ],
)
def test_an_adapter_is_never_dropped_in_silence(
    model: str, adapter: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unbuilt(monkeypatch, adapter)
    write_sparse(tmp_path / "model.safetensors", manifests()[model])
    manager = cpu(None)
    with pytest.raises(UnsupportedModelError, match=adapter):
        manager.load_models(tmp_path)
    assert manager.loaded == []


def test_an_adapter_is_left_out_when_the_caller_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbuilt(monkeypatch, "wan_video_reference_adapter")
    weights = {
        **toy_dit().state_dict(),
        "ref_conv.weight": torch.zeros(96, 16, 2, 2),
        "ref_conv.bias": torch.zeros(96),
    }
    save_file(weights, tmp_path / "dit.safetensors", metadata=HEADS)
    assert cpu().load_models(tmp_path, model_names=[DIT]).model_name == [DIT]
    assert "Not loaded, because model_names does not name it: wan_video_reference_adapter" in caplog.text
    with pytest.raises(ArgumentError, match="model_names asks for wan_video_vae; these paths hold"):
        cpu().load_models(tmp_path, model_names=[VAE])


@pytest.mark.parametrize("given", ["folder", "file"])
def test_an_encoder_for_other_variants_is_passed_over_in_a_folder_only(
    given: str, monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbuilt(monkeypatch, "wan_video_image_encoder")
    clip = write_sparse(folder / "models_clip.safetensors", manifests()["clip_xlm_roberta_vit_h_14"])
    if given == "folder":
        assert sorted(cpu().load_models(folder).model_name) == [DIT, TEXT_ENCODER, VAE]
        assert "Passed over" in caplog.text and "CLIP image encoder" in caplog.text
    else:
        with pytest.raises(UnsupportedModelError, match="CLIP image encoder"):
            cpu().load_models([folder, clip])

from __future__ import annotations

import inspect
import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.layouts import DIFFUSERS_DIT, DIFFUSERS_VAE21, UMT5
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
from diffsynth.models.model_manager import ModelManager
from tests.unit.checkpoints.weights import manifests, toy_dit, write_sparse

DIT, TEXT_ENCODER, VAE = "wan_video_dit", "wan_video_text_encoder", "wan_video_vae"
HEADS = {"config": json.dumps({"num_heads": 3})}


def toy_text_encoder() -> nn.Module:
    from diffsynth.models.wan.text_encoder import WanTextEncoder

    sizes = {
        "vocab_size": 50,
        "dim": 24,
        "dim_attn": 24,
        "dim_ffn": 40,
        "num_heads": 3,
        "num_layers": 2,
        "num_buckets": 32,
    }
    return WanTextEncoder.from_config(sizes)


def toy_vae() -> nn.Module:
    from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE

    return WanVideoVAE(VAEConfig(dim=8, num_res_blocks=1))


def split(network: nn.Module, folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = list(network.state_dict().items())
    paths = [
        folder / f"diffusion_pytorch_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]
    for n, path in enumerate(paths):
        save_file(dict(weights[n::count]), path, metadata=HEADS)
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An official folder: sharded DiT, text encoder and VAE as .pth, tokenizer."""
    split(toy_dit(), tmp_path)
    torch.save(toy_text_encoder().state_dict(), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"model_state": toy_vae().state_dict()}, tmp_path / "Wan2.1_VAE.pth")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    return tmp_path


def cpu(dtype: torch.dtype | None = torch.float32) -> ModelManager:
    return ModelManager(torch_dtype=dtype, device="cpu")


def all_three(folder: Path) -> tuple[list[Path], Path, Path]:
    shards = sorted(folder.glob("diffusion*"))
    return shards, folder / "models_t5_umt5-xxl-enc-bf16.pth", folder / "Wan2.1_VAE.pth"


@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(lambda f: f, id="folder"),
        pytest.param(lambda f: [str(f)], id="folder-in-list"),
        pytest.param(lambda f: [all_three(f)[0], *map(str, all_three(f)[1:])], id="list-of-shards"),
        pytest.param(lambda f: [*all_three(f)[0], *all_three(f)[1:]], id="flat-shards"),
        pytest.param(
            lambda f: [
                all_three(f)[0][2],
                all_three(f)[1],
                all_three(f)[0][0],
                all_three(f)[2],
                all_three(f)[0][1],
            ],
            id="mixed",
        ),
        pytest.param(lambda f: [str(f / "*.safetensors"), str(f / "*.pth")], id="globs"),
    ],
)
def test_a_model_loads_however_it_is_given(arrange: Callable[[Path], object], folder: Path) -> None:
    manager = cpu()
    assert manager.load_models(arrange(folder)) is manager  # type: ignore[arg-type]
    assert sorted(manager.model_name) == [DIT, TEXT_ENCODER, VAE]
    assert len(manager.model) == len(manager.model_path) == len(manager.loaded) == 3
    assert type(manager.fetch_model(DIT)).__name__ == "WanDiT"
    assert type(manager.fetch_model(TEXT_ENCODER)).__name__ == "WanTextEncoder"
    assert type(manager.fetch_model(VAE)).__name__ == "WanVideoVAE"


def test_weights_are_those_of_the_files(folder: Path) -> None:
    manager = cpu(None).load_models(folder)
    for entry in manager.loaded:
        stored = Checkpoint.open(list(entry.paths))
        for name, weight in entry.model.state_dict().items():
            assert torch.equal(weight, stored.tensor(name)), name
        assert not entry.model.training and not any(p.requires_grad for p in entry.model.parameters())


def test_shards_of_any_name_are_put_together(tmp_path: Path) -> None:
    for part, path in enumerate(split(toy_dit(), tmp_path, 2)):
        path.rename(tmp_path / f"part{part}.safetensors")
    vae = tmp_path / "vae.safetensors"
    save_file(toy_vae().state_dict(), vae)
    parts = [tmp_path / "part0.safetensors", tmp_path / "part1.safetensors"]
    assert cpu().load_models([parts, vae]).model_name == [DIT, VAE]
    assert cpu().load_models([parts[0], vae, parts[1]]).model_name == [DIT, VAE]
    with pytest.raises(UnknownCheckpointError, match="pass them as one inner list"):
        cpu().load_models([parts[1], vae])


def test_one_string_is_one_path(folder: Path) -> None:
    assert cpu().load_models(str(folder / "Wan2.1_VAE.pth")).model_name == [VAE]
    manager = cpu()
    assert manager.load_model(str(folder / "Wan2.1_VAE.pth")) is None  # as in v1
    manager.load_model([str(path) for path in all_three(folder)[0]])
    assert manager.model_name == [VAE, DIT]
    assert ModelManager(torch.float32, "cpu", file_path_list=[str(folder)]).model_name == [
        VAE,
        DIT,
        TEXT_ENCODER,
    ]


def test_a_network_is_fetched_by_name_and_path(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = str(folder / "Wan2.1_VAE.pth")
    manager = cpu().load_models([folder, vae]).load_models([vae])
    assert manager.fetch_model(VAE, file_path=vae) is manager.fetch_model(VAE)
    assert manager.fetch_model(VAE, require_model_path=True) == (manager.fetch_model(VAE), vae)
    _, paths = manager.fetch_model(DIT, require_model_path=True) or (None, None)
    assert paths == [str(path) for path in all_three(folder)[0]]
    with caplog.at_level(logging.INFO, "diffsynth"):
        assert manager.fetch_model("wan_video_vace") is None
        assert manager.fetch_model(DIT, file_path=vae) is None
        assert manager.fetch_model(VAE) is not None
    assert "No wan_video_vace is loaded" in caplog.text and "2 networks are wan_video_vae" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_when_asked(dtype: torch.dtype, folder: Path) -> None:
    manager = cpu(None).load_models(folder, torch_dtype=dtype)
    assert {weight.dtype for model in manager.model for weight in model.state_dict().values()} == {dtype}
    assert {
        p.dtype
        for model in ModelManager(dtype, "cpu", file_path_list=folder).model
        for p in model.parameters()
    } == {dtype}


def test_no_dtype_keeps_that_of_the_file(tmp_path: Path) -> None:
    save_file(toy_vae().half().state_dict(), tmp_path / "vae.safetensors")
    assert next(cpu(None).load_models(tmp_path).model[0].parameters()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_of_the_fp8_formats_one_is_kept(dtype: torch.dtype, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"kept in torch\.float8_e4m3fn"):
        cpu(dtype)
    with pytest.raises(ArgumentError, match=str(dtype)):
        cpu().load_models(folder, torch_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", 3])
def test_a_dtype_that_is_none_is_refused(dtype: object) -> None:
    with pytest.raises(ArgumentError, match="torch_dtype is"):
        cpu(dtype)  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="torch finds no GPU"):
        ModelManager(device="cuda")
    with pytest.raises(ArgumentError, match="'cuda:1'"):
        cpu().load_models(folder, device="cuda:1")
    with caplog.at_level(logging.INFO, "diffsynth"):
        assert ModelManager(device=None).device.type == "cpu"
        assert ModelManager().device.type == "cpu"
    assert caplog.text.count("no GPU was found") == 2


def test_the_signature_is_that_of_v1() -> None:
    parameters = inspect.signature(ModelManager).parameters
    assert list(parameters) == [
        "torch_dtype",
        "device",
        "model_id_list",
        "file_path_list",
        "downloading_priority",
    ]
    assert parameters["device"].default == "cuda" and parameters["torch_dtype"].default == torch.bfloat16
    assert parameters["downloading_priority"].default == ("ModelScope", "HuggingFace")
    load = ["self", "file_path_list", "model_names", "device", "torch_dtype"]
    assert list(inspect.signature(ModelManager.load_models).parameters) == load
    fetch = ["self", "model_name", "file_path", "require_model_path"]
    assert list(inspect.signature(ModelManager.fetch_model).parameters) == fetch


def test_one_line_tells_what_was_loaded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "diffsynth"):
        cpu(torch.bfloat16).load_models(folder)
    lines = [record.message for record in caplog.records if record.message.startswith("Loaded")]
    assert len(lines) == 3
    (dit,) = [line for line in lines if DIT in line]
    assert (
        "t2v" in dit
        and "bfloat16" in dit
        and "GiB" in dit
        and "00001-of-00003.safetensors (+2 shards)" in dit
    )


def test_left_over_tensors_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {**toy_dit().state_dict(), "blocks.0.cam_encoder.weight": torch.zeros(3)}
    save_file(weights, tmp_path / "dit.safetensors", metadata=HEADS)
    cpu().load_models(tmp_path)
    assert "1 tensors belong to no known network" in caplog.text and "cam_encoder" in caplog.text


# errors come before anything is built


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


# other layouts


def test_a_diffusers_folder_loads_with_the_same_weights(tmp_path: Path) -> None:
    networks = {"transformer": toy_dit(), "text_encoder": toy_text_encoder(), "vae": toy_vae()}
    layouts = {"transformer": DIFFUSERS_DIT, "text_encoder": UMT5, "vae": DIFFUSERS_VAE21}
    index: dict[str, object] = {
        "_class_name": "WanPipeline",
        "tokenizer": ["transformers", "T5TokenizerFast"],
    }
    for part, network in networks.items():
        official = tmp_path / f"{part}.safetensors"
        save_file(network.state_dict(), official)
        other = Checkpoint.open(official).renamed(layouts[part].inverse())
        (tmp_path / "model" / part).mkdir(parents=True)
        weights = {name: other.tensor(name).clone() for name in other.shapes}
        save_file(weights, tmp_path / "model" / part / "diffusion_pytorch_model.safetensors")
        index[part] = ["diffusers", part]
    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "in_channels": 16,
        "num_layers": 3,
        "image_dim": None,
    }
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    manager = cpu(None).load_models(tmp_path / "model")
    assert {entry.match.layout for entry in manager.loaded} == {"diffusers"}
    for name, part in ((DIT, "transformer"), (TEXT_ENCODER, "text_encoder"), (VAE, "vae")):
        model = manager.fetch_model(name)
        assert model is not None
        for key, weight in networks[part].state_dict().items():
            assert torch.equal(model.state_dict()[key], weight), key


def test_two_experts_keep_their_roles(tmp_path: Path) -> None:
    for expert in ("low_noise_model", "high_noise_model"):
        split(toy_dit(), tmp_path / expert, 2)
    manager = cpu().load_models([tmp_path / "low_noise_model", tmp_path / "high_noise_model"])
    assert manager.model_name == [DIT, DIT]
    assert [entry.match.role for entry in manager.loaded] == ["low", "high"]
    assert [entry.match.role for entry in cpu().load_models(tmp_path).loaded] == ["high", "low"]


def test_move_all_networks(folder: Path) -> None:
    manager = cpu().load_models(folder)
    manager.to("meta")
    assert all(p.is_meta for model in manager.model for p in model.parameters())


# downloads


def hub(monkeypatch: pytest.MonkeyPatch, module: str, answer: object) -> list[str]:
    calls: list[str] = []

    def snapshot_download(model_id: str, local_dir: str, allow_patterns: list[str] | None = None) -> str:
        calls.append(f"{module} {model_id}")
        if isinstance(answer, Exception):
            raise answer
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        save_file(toy_vae().state_dict(), Path(local_dir) / "vae.safetensors")
        return local_dir

    fake = types.ModuleType(module)
    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, fake)
    return calls


def test_ids_are_downloaded_and_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    first = hub(monkeypatch, "modelscope", OSError("not there"))
    second = hub(monkeypatch, "huggingface_hub", None)
    manager = ModelManager(torch.float32, "cpu", model_id_list=["Wan-AI/Wan2.1-T2V-1.3B"])
    assert manager.model_name == [VAE]
    assert first == ["modelscope Wan-AI/Wan2.1-T2V-1.3B"] and second == [
        "huggingface_hub Wan-AI/Wan2.1-T2V-1.3B"
    ]
    assert (tmp_path / "models" / "Wan-AI" / "Wan2.1-T2V-1.3B" / "vae.safetensors").is_file()


def test_a_download_that_fails_says_what_each_site_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, "modelscope", OSError("no such model"))
    hub(monkeypatch, "huggingface_hub", OSError("gated"))
    with pytest.raises(CheckpointNotFoundError, match="ModelScope: no such model; HuggingFace: gated"):
        ModelManager(device="cpu", model_id_list=["a/b"])


@pytest.mark.parametrize(
    ("ids", "sites"),
    [(["Wan2.1"], ["ModelScope"]), (["../x"], ["ModelScope"]), (["a/b"], ["Mars"]), (["a/b"], [])],
)
def test_what_is_no_id_or_site_is_refused(ids: list[str], sites: list[str]) -> None:
    with pytest.raises(ArgumentError):
        ModelManager(device="cpu", model_id_list=ids, downloading_priority=sites)


def test_single_files_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffsynth.models.download import download_customized_models

    hub(monkeypatch, "modelscope", None)
    assert download_customized_models("a/b", "*.safetensors", tmp_path) == [str(tmp_path / "vae.safetensors")]
    with pytest.raises(CheckpointNotFoundError, match=r"has no file nothing\.pth"):
        download_customized_models("a/b", "nothing.pth", tmp_path)

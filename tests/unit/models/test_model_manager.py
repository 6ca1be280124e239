"""Files become networks however they are given, in the dtype asked for, and v1's calls hold."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.layouts import DIFFUSERS_DIT, DIFFUSERS_VAE21, UMT5
from diffsynth.errors import ArgumentError, UnknownCheckpointError
from diffsynth.models.model_manager import ModelManager
from tests.unit.checkpoints.weights import toy_dit
from tests.unit.models.toy_folders import (
    DIT,
    HEADS,
    TEXT_ENCODER,
    VAE,
    all_three,
    cpu,
    split,
    toy_text_encoder,
    toy_vae,
    write_official_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_official_folder(tmp_path)


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
        and "MiB" in dit
        and "00001-of-00003.safetensors (+2 shards)" in dit
    )


def test_left_over_tensors_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {**toy_dit().state_dict(), "blocks.0.cam_encoder.weight": torch.zeros(3)}
    save_file(weights, tmp_path / "dit.safetensors", metadata=HEADS)
    cpu().load_models(tmp_path)
    assert "1 tensors belong to no known network" in caplog.text and "cam_encoder" in caplog.text


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

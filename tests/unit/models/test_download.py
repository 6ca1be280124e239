"""Ids and single files are downloaded, from the first site that has them."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.errors import ArgumentError, CheckpointNotFoundError
from diffsynth.models.model_manager import ModelManager
from tests.unit.models.toy_folders import VAE, toy_vae


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


def test_a_download_that_fails_is_told_once_and_leaves_no_empty_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)

    def snapshot_download(model_id: str, local_dir: str, allow_patterns: list[str] | None = None) -> str:
        Path(local_dir).mkdir(parents=True, exist_ok=True)  # as the clients do before they ask
        raise OSError("Name or service\nnot known " * 100)

    for module in ("modelscope", "huggingface_hub"):
        fake = types.ModuleType(module)
        fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, fake)
    with pytest.raises(CheckpointNotFoundError) as error:
        ModelManager(device="cpu", model_id_list=["a/b"])
    told = str(error.value)
    assert len(told) < 700 and "\n" not in told and "Name or service" not in caplog.text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointNotFoundError):
        ModelManager(device="cpu", model_id_list=["a/b"])
    assert [path.name for path in tmp_path.iterdir()] == ["models"], "what was there stays"


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

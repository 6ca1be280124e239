"""Latents are on the disk, whole, before the VAE is asked; a call that cannot save them does not begin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffsynth.errors import (
    ArgumentError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DiffSynthError,
    OutputPathError,
)
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.saved_latents import latents_beside, read_latents, save_latents, steps_beside
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from tests.unit.pipelines.counting import calls_of

PARTS = PipelineComponents(device=torch.device("cpu"), dtype=torch.float32)


def test_a_call_that_dies_in_its_last_step_leaves_its_latents(
    toy_pipe: WanVideoPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any, toy_folder: Path
) -> None:
    file = tmp_path / "new folder" / "cat.safetensors"
    expected = toy_pipe("a red circle", seed=3, output_type="latent")

    def broken(*_: object, **__: object) -> Iterator[torch.Tensor]:
        assert file.is_file(), "saved before the VAE is asked"
        raise RuntimeError("the driver died")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the driver died"):
        patched.setattr(WanVideoVAE, "decode_stream", broken)
        toy_pipe("a red circle", seed=3, save_latents=file)
    assert f"The latents are kept in {file}; " in caplog.text
    assert f"diffsynth decode '{file}'" in caplog.text
    saved = read_latents(file)
    assert torch.equal(saved.latents, expected)
    assert {"prompt": "a red circle", "seed": 3, "num_frames": 5, "precision": "official"}.items() <= (
        saved.settings.items()
    )
    assert saved.vae == toy_folder / "vae.safetensors" and saved.vae_dtype == "float32"
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no temporary file is left"


def test_saved_latents_stay_when_the_video_is_made(toy_pipe: WanVideoPipeline, tmp_path: Path) -> None:
    file = tmp_path / "cat.safetensors"
    video = toy_pipe("a red circle", seed=3, save_latents=str(file), output_type="pt")
    assert "save_latents" not in toy_pipe.last_settings
    assert torch.equal(toy_pipe.decode(read_latents(file).latents, output_type="pt"), video)
    toy_pipe(["a", "b"], seed=3, save_latents=file, output_type="latent")
    assert read_latents(file).latents.shape == (2, 16, 2, 2, 4)


class LittleSpace:
    free = 1 << 10


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/proc/none/cat.safetensors", OutputPathError, "cannot be written"),
        ("cat.mp4", OutputPathError, "extension '.mp4'"),
        (".", OutputPathError, "is a folder"),
        (5, ArgumentError, "save_latents is 5; give a path"),
        ("full.safetensors", OutputPathError, "are free in"),
    ],
    ids=str,
)
def test_what_cannot_be_saved_is_known_before_anything_runs(
    toy_pipe: WanVideoPipeline,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    path: Any,
    kind: type[DiffSynthError],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if path == "full.safetensors":
        monkeypatch.setattr("shutil.disk_usage", lambda _: LittleSpace)
    with calls_of(toy_pipe.text_encoder, toy_pipe.dit) as calls, pytest.raises(kind, match=words):
        toy_pipe("a red circle", seed=0, save_latents=path)
    assert calls == [] and list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_while_it_is_written_leaves_nothing_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cat.safetensors"
    save_latents(file, torch.ones(1, 16, 1, 2, 2), PARTS, {})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputPathError, match=r"No space left on device\. Nothing half-written"):
        save_latents(file, torch.zeros(1, 16, 1, 2, 2), PARTS, {})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert read_latents(file).latents.all(), "the file from before is still there"


def test_a_row_of_a_batch_is_saved_alone(tmp_path: Path) -> None:
    batch = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 16, 4, 8, 8).contiguous()
    file = save_latents(tmp_path / "row.safetensors", batch[1:2], PARTS, {"seed": 4}, {"name": "cat.mp4"})
    assert file.stat().st_size < 4 * 16 * 4 * 64 + 1024
    saved = read_latents(file)
    assert (saved.latents == 1).all() and saved.output == {"name": "cat.mp4"} and saved.vae is None
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["settings"]) == {"seed": 4}


def test_the_shipped_vae_is_found_wherever_the_package_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vae = tiny_folder() / "Wan_tiny_VAE.safetensors"
    parts = PipelineComponents(device=PARTS.device, dtype=PARTS.dtype, sources={"vae": str(vae)})
    file = save_latents(tmp_path / "a.safetensors", torch.zeros(1, 16, 1, 2, 2), parts, {})
    assert read_latents(file).vae == vae
    elsewhere = tmp_path / "site-packages"
    elsewhere.mkdir()
    (elsewhere / vae.name).touch()
    monkeypatch.setattr("diffsynth.pipelines.saved_latents.tiny_folder", lambda: elsewhere)
    assert read_latents(file).vae == elsewhere / vae.name


def test_files_that_hold_no_latents_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        read_latents(tmp_path / "absent.safetensors")
    weights = tmp_path / "weights.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, weights)
    with pytest.raises(ArgumentError, match=r"holds 1 tensors \(conv.weight\), not latents"):
        read_latents(weights)
    save_file({"latents": torch.zeros(2, 2)}, weights)
    with pytest.raises(ArgumentError, match=r"latents of shape \(2, 2\), not latents \(B, C, T, h, w\)"):
        read_latents(weights)
    whole = save_latents(tmp_path / "a.safetensors", torch.zeros(1, 16, 1, 2, 2), PARTS, {})
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="is cut off"):
        read_latents(whole)
    save_file({"latents": torch.zeros(1, 16, 1, 2, 2)}, weights, {"settings": "[1]"})
    with pytest.raises(ArgumentError, match=r"'settings' .*\[1\]"):
        read_latents(weights)


def test_latents_of_another_program_need_no_settings(tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(1, 16, 1, 2, 2)}, tmp_path / "bare.safetensors")
    saved = read_latents(tmp_path / "bare.safetensors")
    assert (saved.settings, saved.vae, saved.vae_dtype, saved.output) == ({}, None, None, {})


def test_the_name_stands_beside_the_video() -> None:
    video = Path("a/cat.v2.mp4")
    assert latents_beside(video, "1a2b3c4d") == Path("a/cat.v2.1a2b3c4d.latents.safetensors")
    assert steps_beside(video, "1a2b3c4d") == Path("a/cat.v2.1a2b3c4d.steps.safetensors")

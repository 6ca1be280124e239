"""The tutorial of docs/training.md, typed word for word, with the tiny Wan's files and toy sizes."""

from __future__ import annotations

import csv
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffsynth
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from diffsynth.training.samples import EncodedSample

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
TUTORIAL = PAGE.partition("## As with DiffSynth-Studio v1")[2].partition("\n## ")[0]
ENCODE, LORA, FULL = re.findall(r'```shell\nCUDA_VISIBLE_DEVICES="0" python (.*?)```', TUTORIAL, re.S)
WITH_LORA, WITH_FULL = re.findall(r"```python\n(.*?)```", TUTORIAL, re.S)
SCRIPTS = ("train/train_wan_t2v.py", "examples/wanvideo/train_wan_t2v.py")
TOY_SIZES = {
    "--num_frames 81": "--num_frames 5", "--height 480": "--height 64", "--width 832": "--width 64",
    "--steps_per_epoch 500": "--steps_per_epoch 3", "--max_epochs 10": "--max_epochs 2",
    "step=500": "step=3", 'device="cuda"': 'device="cpu"', "num_inference_steps=50": "num_inference_steps=1",
}  # fmt: skip
FILES = {
    "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth": "models_t5_tiny.safetensors",
    "Wan2.1_VAE.pth": "Wan_tiny_VAE.safetensors",
}


def at_toy_size(text: str) -> str:
    for real, toy in TOY_SIZES.items():
        text = text.replace(real, toy)
    return text


def type_in(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *words = shlex.split(at_toy_size(command).replace("\\\n", " "))
    monkeypatch.setattr("sys.argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0


def write_clip(path: Path, num_frames: int) -> None:
    """A bright square that goes over a dark ground."""
    frames = np.full((num_frames, 64, 64, 3), 30, np.uint8)
    for number, frame in enumerate(frames):
        frame[20:40, 4 + 2 * number : 24 + 2 * number] = (200, 40, 40)
    diffsynth.save_video(list(frames), path, fps=8)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the tutorial wants it: steps 1 and 2."""
    models = tmp_path / "models" / "Wan-AI" / "Wan2.1-T2V-1.3B"
    models.mkdir(parents=True)
    for name, tiny in FILES.items():
        shutil.copy(tiny_folder() / tiny, models / name)
    shutil.copytree(tiny_folder() / "google", models / "google")
    media = tmp_path / "data" / "example_dataset" / "train"
    media.mkdir(parents=True)
    write_clip(media / "video_00001.mp4", 9)
    diffsynth.save_video([np.zeros((64, 64, 3), np.uint8)] * 5, media / "clip.mp4", fps=8)
    diffsynth.VideoData(media / "clip.mp4")[0].save(media / "image_00002.jpg")
    (media / "clip.mp4").unlink()
    [rows] = re.findall(r"`metadata.csv`:\n\n```\n(.*?)```", TUTORIAL, re.S)
    (media.parent / "metadata.csv").write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_runs_word_for_word(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    type_in(ENCODE, monkeypatch)
    told = capfd.readouterr().err
    assert "video_00001.mp4: 4 of 9 frames unused" in told
    cached = sorted(path.name for path in (place / "data/example_dataset/train").glob("*.safetensors"))
    assert [re.sub(r"[0-9a-f]{16}", "KEY", name) for name in cached] == [
        "image_00002.jpg.KEY.tensors.safetensors", "video_00001.mp4.KEY.tensors.safetensors",
    ]  # fmt: skip
    calls = WanVideoPipeline.__call__
    asked: list[WanVideoPipeline] = []

    def small(self: WanVideoPipeline, **given: Any) -> Any:
        asked.append(self)
        return calls(self, **{**given, "height": 64, "width": 64, "num_frames": 5, "tiled": False})

    monkeypatch.setattr(WanVideoPipeline, "__call__", small)
    # the second training is version_2; its reader looks where that of a first one would be
    for command, code, version in ((LORA, WITH_LORA, 1), (FULL, WITH_FULL, 2)):
        type_in(command, monkeypatch)
        logs = place / f"models/lightning_logs/version_{version}"
        made = sorted(path.name for path in (logs / "checkpoints").iterdir())
        ends = ("ckpt", "safetensors")
        assert made == [f"epoch={e}-step={3 * e + 3}.{end}" for e in (0, 1) for end in ends]
        with (logs / "metrics.csv").open() as file:
            # two clips are seen every two steps; an epoch is what --steps_per_epoch says
            assert [row["epoch"] for row in csv.DictReader(file)] == list("000111")
        exec(compile(at_toy_size(code).replace("version_1", f"version_{version}"), "training.md", "exec"), {})
        assert len(diffsynth.VideoData(place / "video.mp4")) == 5
    base, tuned = tiny_folder() / FILES["diffusion_pytorch_model.safetensors"], asked[1]
    before = diffsynth.ModelManager(torch_dtype=torch.float32, device="cpu").load_models(base)
    one, other = before.fetch_model("wan_video_dit"), tuned.parts.high.dit  # type: ignore[union-attr]
    assert not torch.equal(one.blocks[0].ffn[0].weight, other.blocks[0].ffn[0].weight.float())


def test_image_to_video_trains_from_shards_parted_by_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dit, text_encoder, vae, image_encoder = toy_files("i2v")
    tensors, shards = load_file(dit), [tmp_path / f"part-{number}.safetensors" for number in (1, 2)]
    for number, shard in enumerate(shards):
        names = sorted(tensors)[number::2]
        save_file({name: tensors[name] for name in names}, shard, dict(Checkpoint.open(dit).metadata))
    media = tmp_path / "data" / "train"
    media.mkdir(parents=True)
    write_clip(media / "a.mp4", 5)
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\na.mp4,a square goes\n")
    common = f"{SCRIPTS[1]} --dataset_path {tmp_path}/data --output_path {tmp_path}/out"
    common += f" --dit_path {','.join(map(str, shards))} --num_frames 5 --height 32 --width 32"
    # The toy's image tokens are narrower than those that data_process takes for granted without a DiT.
    encoders = f"--text_encoder_path {text_encoder} --vae_path {vae} --image_encoder_path {image_encoder}"
    type_in(f"{common} --task data_process {encoders}", monkeypatch)
    [sample] = media.glob("*.tensors.safetensors")
    positive = EncodedSample.load(sample).positive
    assert set(positive.planes) == {"mask", "image"} and positive.image is not None
    training = f"{common} --task train --steps_per_epoch 1 --dataloader_num_workers 0"
    type_in(f"{training} --use_gradient_checkpointing_offload", monkeypatch)
    first = tmp_path / "out/lightning_logs/version_1/checkpoints/epoch=0-step=1.ckpt"
    before = torch.load(first, weights_only=True)["state_dict"]
    type_in(f"{training} --pretrained_lora_path '{first}' --learning_rate 1e-9", monkeypatch)
    after = torch.load(Path(str(first).replace("version_1", "version_2")), weights_only=True)["state_dict"]
    assert all((after[name] - tensor).abs().max() < 1e-7 for name, tensor in before.items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_runs_from_any_folder_without_being_installed(script: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, str(ROOT / script), "--task", "train", "--dataset_pth", "x"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Did you mean 'dataset_path'?" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_what_was_encoded_last_says_the_size(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffsynth.training.v1_flags import config_of, parsed

    type_in(ENCODE, monkeypatch)
    _, *words = shlex.split(at_toy_size(LORA).replace("\\\n", " "))
    with caplog.at_level(logging.INFO, "diffsynth"):
        config = config_of(parsed(words))
    assert (config.data[0].num_frames, config.data[0].sizes) == ((5,), ((64, 64),))
    assert "--num_frames 5, --height 64, --width 64" in caplog.text
    assert config_of(parsed([*words, "--num_frames", "9"])).data[0].num_frames == (9,)

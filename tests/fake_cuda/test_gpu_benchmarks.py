"""What is run first on a GPU, on an image that has torch and little else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.all import PARTS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
HIDDEN = {"av", "diffusers", "ftfy", "pydantic", "torchao"}  # which images with torch often lack
# Python runs it at its start, so that processes started by processes begin the same way.
START = f"""
import sys

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden)
import tests.fake_cuda.answers
"""
GENERATE_AND_TRAIN = """
import sys
from pathlib import Path
import torch
from diffsynth import ModelManager, VideoData, WanVideoPipeline, save_frames
from diffsynth.tiny import tiny_folder
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.run import train

out = Path(sys.argv[1])
files = {name: str(tiny_folder() / file) for name, file in (
    ("dit", "diffusion_pytorch_model.safetensors"), ("text_encoder", "models_t5_tiny.safetensors"),
    ("vae", "Wan_tiny_VAE.safetensors"),
)}
manager = ModelManager(torch.bfloat16, "cpu").load_models(list(files.values()))
pipe = WanVideoPipeline.from_model_manager(manager, device="cuda")
frames = pipe("a red circle", height=64, width=64, num_frames=5, num_inference_steps=2, progress_bar_cmd=iter)
save_frames(frames, out / "data")
assert len(VideoData(image_folder=str(out / "data"))) == 5
for picture in (out / "data").iterdir():
    picture.with_suffix(".txt").write_text("a red circle")
for task in ("data_process", "train"):
    train(build(TrainConfig, {
        "model": {**files, "dit": [files["dit"]], "dtype": "bfloat16", "device": "cuda"},
        "data": [{"path": str(out / "data"), "sizes": [[64, 64]], "num_frames": [1]}],
        "tune": {"rank": 4, "alpha": 4.0},
        "run": {"task": task, "output": str(out / task), "steps": 2, "batch_size": 2, "workers": 0},
    }, ""))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(START)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "DIFFSYNTH_COMPILE": "0"}


def run(words: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_all_benchmarks_run_without_packages_of_others(tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "rows"
    said = run(["-m", "benchmarks.gpu.all", "--toy", "--minutes", "60", "--out", str(out)], environment)
    assert all(f"\n{part.name}: done after" in said for part in PARTS), said
    rows = [json.loads(line) for file in out.iterdir() for line in file.read_text().splitlines()]
    assert {row["machine"]["gpu"] for row in rows} == {"Fake GPU sm_90"}
    failed = [row for row in rows if "error" in row]
    assert {row["error"] for row in failed} <= {"ModuleNotFoundError: No module named 'diffusers'"}
    assert {row["figure"].rpartition("against ")[2].split()[0] for row in failed} == {"diffusers"}
    assert len(rows) - len(failed) >= 60


def test_generating_and_training_need_none_of_them(tmp_path: Path, environment: dict[str, str]) -> None:
    run(["-c", GENERATE_AND_TRAIN, str(tmp_path)], environment)
    assert list((tmp_path / "train").rglob("*.safetensors"))

"""Training runs of the toy model by Lightning, in every way in which memory is traded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffsynth.ops import compiled
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.run import train
from tests.fake_cuda import controls
from tests.unit.training import toy_runs
from tests.unit.training.clips_of_noise import HEIGHT, WIDTH, write_picture

Section = dict[str, Any]
FULL = {"gradient_checkpointing": "full"}
KEEP = {"gradient_checkpointing": "keep_attention"}
SAMPLES = {"every": 2, "prompts": ["a ball"], "holdout": 1}
WAYS: dict[str, dict[str, Section]] = {
    "plain": {},
    "stream-offload-keep": {
        "memory": {"gradient_checkpointing": "keep_attention", "stream": True, "offload": True}
    },
    "full": {"memory": FULL},
    "keep": {"memory": KEEP},
    "offload": {"memory": {**FULL, "offload": True}},
    "stream": {"memory": {**FULL, "stream": True}},
    "ema": {"optimizer": {"name": "sgd", "ema": 0.9, "schedule": "cosine"}},
    "fp8": {"model": {"dtype": "fp8"}},
    "fp8-stream": {"model": {"dtype": "fp8"}, "memory": {**FULL, "stream": True}},
    "samples": {"samples": SAMPLES},
    "all-weights": {"tune": {"kind": "full"}},
}
COMPILED: dict[str, dict[str, Section]] = {
    "compile": {"memory": {**FULL, "compile": True}},
    "compile-samples": {"memory": {"compile": True}, "samples": SAMPLES},
}
IN_DEFAULT = ("plain", "stream-offload-keep")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pictures that are encoded on the GPU already."""
    from diffsynth.models.toy import toy_files

    folder = tmp_path_factory.mktemp("toy")
    for number in range(6):
        write_picture(folder / "data" / f"{number}.png", seed=number)
        (folder / "data" / f"{number}.txt").write_text(f"a red circle {number}")
    dit, text_encoder, vae = toy_files("t2v", num_layers=4)
    made = {
        "model": {
            "dit": [dit],
            "text_encoder": text_encoder,
            "vae": vae,
            "dtype": "bfloat16",
            "device": "cuda",
        },
        "data": [{"path": str(folder / "data"), "sizes": [[HEIGHT, WIDTH]], "num_frames": [1]}],
        "cache": {"dtype": "float32"},
        "tune": {"rank": 4, "alpha": 8.0},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "run": {"task": "data_process", "output": str(folder / "cache"), "batch_size": 2, "workers": 0},
    }
    train(build(TrainConfig, made, ""))
    return made


def runs(settings: dict[str, Any], output: Path, sections: dict[str, Section]) -> None:
    config = toy_runs.config_of(
        settings,
        output,
        run={"steps": 3, "workers": 0},
        **{name: dict(own) for name, own in sections.items()},
    )
    assert train(config).step == 3


@pytest.mark.parametrize(
    "way", [pytest.param(name, marks=() if name in IN_DEFAULT else pytest.mark.slow) for name in WAYS]
)
def test_training_runs(way: str, settings: dict[str, Any], tmp_path: Path) -> None:
    runs(settings, tmp_path, WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_blocks_train_and_make_samples(
    way: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "is_switched_on", lambda: True)
    runs(settings, tmp_path, COMPILED[way])
    assert not compiled.compiler.has_failed


@pytest.mark.slow
def test_a_streamed_training_goes_on_where_nothing_is_locked(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    controls.lockable_memory(0)
    runs(settings, tmp_path, WAYS["stream"])

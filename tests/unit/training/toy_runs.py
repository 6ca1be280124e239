"""Whole training runs of the toy model on six pictures, encoded once."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from diffsynth.models.toy import toy_files
from diffsynth.training import module as training_module
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_files import build
from diffsynth.training.run import RunReport, train
from diffsynth.training.sharding import on_cpu
from tests.unit.training.clips_of_noise import HEIGHT, WIDTH, write_picture

NUM_PICTURES = 6
ADAMW = {"name": "adamw", "learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 2, "ema": 0.9}


def toy_settings(folder: Path) -> dict[str, Any]:
    """Settings over a folder of pictures that are encoded already."""
    for number in range(NUM_PICTURES):
        write_picture(folder / "data" / f"{number}.png", seed=number)
        (folder / "data" / f"{number}.txt").write_text(f"a red circle {number}")
    dit, text_encoder, vae = toy_files("t2v")
    settings = {
        "model": {
            "dit": [dit],
            "text_encoder": text_encoder,
            "vae": vae,
            "dtype": "float32",
            "device": "cpu",
        },
        "data": [{"path": str(folder / "data"), "sizes": [[HEIGHT, WIDTH]], "num_frames": [1]}],
        "cache": {"dtype": "float32"},
        "tune": {"rank": 4, "alpha": 8.0},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "run": {"task": "data_process", "output": str(folder / "cache"), "batch_size": 2, "workers": 0},
    }
    train(build(TrainConfig, settings, ""))
    return settings


def config_of(settings: dict[str, Any], output: Path, **sections: dict[str, Any]) -> TrainConfig:
    """The toy's settings with some of them changed, section by section."""
    run = {"task": "train", "steps": 4, "output": str(output), **sections.pop("run", {})}
    changed = {**settings, "run": {**settings["run"], **run}}
    for name, section in sections.items():
        changed[name] = {**changed.get(name, {}), **section}
    config: TrainConfig = build(TrainConfig, changed, "")
    return config


def rows(report: RunReport) -> list[dict[str, str]]:
    assert report.folder is not None
    with (report.folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def trained_tensors(report: RunReport) -> dict[str, Tensor]:
    assert report.checkpoint is not None
    state: dict[str, Tensor] = torch.load(report.checkpoint, weights_only=True)["state_dict"]
    return state


def first_gradients(run: Callable[[], RunReport]) -> tuple[RunReport, list[Tensor]]:
    """A run, and the gradients of its first step before they were clipped; none under DeepSpeed."""
    seen: list[list[Tensor]] = []
    clip = training_module.clip

    def noting(parameters: Any, limit: float) -> float:
        if not seen:
            seen.append([on_cpu(p.grad).clone() for p in parameters if p.grad is not None])
        return clip(parameters, limit)

    training_module.clip = noting
    try:
        return run(), seen[0] if seen else []
    finally:
        training_module.clip = clip


def on_two_ranks(config: TrainConfig, folder: Path) -> tuple[RunReport, list[Tensor]]:
    """`first_gradients` of a run with two processes, as torchrun starts them."""
    codes = _run_ranks(config, folder, dies=False)
    told = "\n".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert codes == [0, 0], f"ranks ended with {codes}: {told}"
    losses, gradients, checkpoint = torch.load(folder / "told.pt", weights_only=True)
    report = RunReport(
        step=len(losses),
        losses=tuple(losses),
        checkpoint=Path(checkpoint),
        export=Path(checkpoint).with_suffix(".safetensors"),
        folder=None,
    )
    return report, gradients


def error_when_a_rank_dies(config: TrainConfig, folder: Path) -> str:
    """What the first of two processes says when the second is killed in its second step."""
    codes = _run_ranks(config, folder, dies=True)
    assert codes[1] == 3 and codes[0] not in (0, None)
    return (folder / "error-0").read_text()


def _run_ranks(config: TrainConfig, folder: Path, dies: bool) -> list[int | None]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun has it
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # the imports are there already
    ranks = [
        context.Process(target=_rank, args=(rank, store.port, config, folder, dies and rank == 1))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.is_alive():
            process.kill()
    return codes


def _rank(rank: int, port: int, config: TrainConfig, folder: Path, dies: bool) -> None:
    import traceback

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    if dies:
        training_module.learning_rate_factor = lambda step, *_: os._exit(3) if step else 1.0
    try:
        report, gradients = first_gradients(lambda: train(config))
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    if rank == 0:
        torch.save([list(report.losses), gradients, str(report.checkpoint)], folder / "told.pt")

"""What happens around the steps of a run: logs, checkpoints, and wishes from outside."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from diffsynth.errors import NotFiniteError, OutputPathError
from diffsynth.portable import peak_memory_bytes
from diffsynth.training.checkpoints import EXPERTS
from diffsynth.training.module import SAVE, STOP, StepReport, WanTrainingModule
from diffsynth.training.stopping import Wishes

logger = logging.getLogger("diffsynth")

OF_EXPERT = ("loss", "learning_rate", "grad_norm", "steps")  # told for each; the last, how many it has had
TIMESTEP_BINS = (0, 200, 400, 600, 800, 1001)  # the loss is told for each
SAVE_FILE, STOP_FILE = "save", "stop"  # in the output folder: touched by the user, removed when obeyed


def bin_names() -> list[str]:
    """Columns of the loss by timestep."""
    return [f"loss_t{low}_{min(1000, high)}" for low, high in pairwise(TIMESTEP_BINS)]


def columns(datasets: Sequence[str], num_experts: int = 1) -> list[str]:
    """Everything that stands in ``metrics.csv`` beside the step; of two experts, each has its own."""
    own = [f"{name}_{role}_noise" for role in EXPERTS for name in OF_EXPERT] if num_experts > 1 else []
    return [
        "epoch", "loss", *bin_names(), *(f"loss_{name}" for name in datasets), "learning_rate", "grad_norm",
        "steps_per_s", "data_wait_s", "peak_gb", "validation_loss", *own,
    ]  # fmt: skip


class StepLog(Callback):
    """Writes a row per step, and shows progress with the time that is left.

    Args:
        dataset_of: the dataset of a sample, by its index; None: there is one only.
        shows: whether to draw the bar.
    """

    def __init__(self, dataset_of: Callable[[int], str] | None = None, shows: bool = True) -> None:
        self._dataset_of, self._shows = dataset_of, shows
        self._bar: Any = None
        self._waits_s, self._ended, self._step_began = 0.0, time.monotonic(), time.monotonic()
        self.validation_loss: float | None = None  # of this step; put here by the validation
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _ours(pl_module)
        self._ended = self._step_began = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._bar = tqdm(
            total=module.config.run.steps, initial=module.start, desc="train", unit="step",
            disable=not (self._shows and trainer.is_global_zero),
        )  # fmt: skip

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._waits_s += time.monotonic() - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        module = _ours(pl_module)
        report = module.report
        if report is not None:
            now = time.monotonic()
            self.losses.append(report.loss)
            row = {
                "epoch": module.batches.epoch_of(report.step - 1),
                **self._losses(report),
                "learning_rate": report.learning_rate,
                "grad_norm": report.grad_norm,
                "steps_per_s": 1 / max(1e-9, now - self._step_began),
                "data_wait_s": self._waits_s,
            }
            if (peak := peak_gb()) is not None:
                row["peak_gb"] = peak
            if report.role is not None and len(module.learners) > 1:
                values = (report.loss, report.learning_rate, report.grad_norm, report.steps_of_expert)
                row |= {f"{n}_{report.role}_noise": v for n, v in zip(OF_EXPERT, values, strict=True)}
            if self.validation_loss is not None:
                row["validation_loss"], self.validation_loss = self.validation_loss, None
            write_rows(trainer, row, report.step)
            self._bar.set_postfix(loss=f"{report.loss:.4f}", wait=f"{self._waits_s:.2f}s", refresh=False)
            self._bar.update()
            self._waits_s, self._step_began = 0.0, now
        self._ended = time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def _losses(self, report: StepReport) -> dict[str, float]:
        found: dict[str, list[float]] = {"loss": report.losses.tolist()}
        for pick, loss, t in zip(
            report.picks, report.losses.tolist(), report.timesteps.tolist(), strict=True
        ):
            number = sum(t >= edge for edge in TIMESTEP_BINS[1:-1])
            found.setdefault(bin_names()[number], []).append(loss)
            if self._dataset_of is not None:
                found.setdefault(f"loss_{self._dataset_of(pick.index)}", []).append(loss)
        return {name: sum(values) / len(values) for name, values in found.items()}


def write_rows(trainer: Trainer, row: Mapping[str, float], step: int) -> None:
    """Tell all loggers. A disk that is full costs the row, not the run: what was learnt is still there."""
    for one in trainer.loggers:
        try:
            one.log_metrics(dict(row), step=step)
        except OSError as error:
            logger.error("No row of step %d in the log of %s: %s. Training goes on.", step, one.name, error)


def peak_gb() -> float | None:
    """Highest memory so far, 1e9 bytes: of the GPU; of this process where there is none, if it is told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = peak_memory_bytes()
    return None if peak is None else peak / 1e9


class Saver(Callback):
    """Saves every so many steps, when it is asked to, when it must stop, and at the end.

    SIGUSR1 and ``<output>/save`` save; the first Ctrl-C, SIGTERM and ``<output>/stop`` save and end the run.
    What one rank sees, all ranks obey after the same step.

    Args:
        output: the folder of the run.
        save: writes a checkpoint and its export; every rank calls it.
        every: steps; 0: at the end only.
        signals: what the user wishes by signals.
    """

    def __init__(
        self, output: Path, save: Callable[[WanTrainingModule], Path], every: int, signals: Wishes
    ) -> None:
        self._output, self._save, self._every, self._signals = output, save, every, signals
        self.saved: tuple[int, Path] | None = None  # the step and the file, of the last one
        self.stopped_by: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._taken()  # those of an earlier run
        _ours(pl_module).wishes = lambda: self._wishes(trainer.is_global_zero)
        self._signals.listen()  # Lightning has put handlers of its own there

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        module = _ours(pl_module)
        if module.report is None:
            return
        wishes = module.report.wishes
        is_due = bool(self._every) and module.done % self._every == 0
        if wishes & STOP and module.done < module.config.run.steps:
            self.stopped_by = self._signals.stopped_by or "a signal or the file 'stop'"
            trainer.should_stop = True
            return  # on_train_end saves
        if is_due or wishes & SAVE:
            try:
                self._keep(module)
            except OutputPathError as error:
                last = f"the last good one is {self.saved[1]}" if self.saved else "none was saved before"
                logger.error(
                    "No checkpoint at step %d; %s, and training goes on. %s", module.done, last, error
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(_ours(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        module = _ours(pl_module)
        # The weights are those before the step that failed, on every rank; other errors may be of one rank.
        if isinstance(exception, NotFiniteError) and module.done > module.start:
            self._keep(module)

    def _keep(self, module: WanTrainingModule) -> None:
        if self.saved is None or self.saved[0] != module.done:
            self.saved = (module.done, self._save(module))

    def _wishes(self, looks_for_files: bool) -> int:
        saves, self._signals.saves = self._signals.saves, False
        wishes = SAVE * saves | STOP * (self._signals.stopped_by is not None)
        return wishes | (self._taken() if looks_for_files else 0)

    def _taken(self) -> int:
        """Wishes by files, which go; something of that name that is not empty was not made by ``touch``."""
        wishes = 0
        for name, wish in ((SAVE_FILE, SAVE), (STOP_FILE, STOP)):
            file = self._output / name
            if file.is_file() and not file.stat().st_size:
                file.unlink(missing_ok=True)
                wishes |= wish
        return wishes


def _ours(module: LightningModule) -> WanTrainingModule:
    assert isinstance(module, WanTrainingModule)
    return module

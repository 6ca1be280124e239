"""A whole run: encode what is missing, load, train, save, and go on where an earlier run stopped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, Dataset

from diffsynth.errors import OutputPathError
from diffsynth.training.batches import Batches, Pick, StepSampler
from diffsynth.training.cache import process
from diffsynth.training.cached_dataset import CachedDataset, open_cache
from diffsynth.training.callbacks import Saver, StepLog, columns
from diffsynth.training.checkpoints import (
    CHECKPOINTS,
    State,
    checkpoint_path,
    drop_old,
    export_path,
    find_resume,
    last_checkpoint,
    read_state,
    require_room,
    require_same_run,
    version_folder,
    write_state,
)
from diffsynth.training.checks import check_run
from diffsynth.training.config import OptimizerConfig, TrainConfig
from diffsynth.training.config_files import save_config
from diffsynth.training.dataset.planning import log_plan
from diffsynth.training.forecast import too_large
from diffsynth.training.loading import (
    checkpoint_metadata,
    encoding_pipeline,
    facts_of,
    file_metadata,
    load_networks,
    maker_of,
    plan_data,
    resolved_device,
    restore,
    run_facts,
)
from diffsynth.training.logs import CsvLog, EventLog, other_logger
from diffsynth.training.module import Drawn, WanTrainingModule
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.optimizers import RATE_SETTINGS, Course, evaluated, resumed_course
from diffsynth.training.processes import (
    Group,
    Ranks,
    is_of_a_lost_rank,
    lost_rank,
    quiet_lightning,
    strategy_of,
)
from diffsynth.training.samples import EncodedSample, collate
from diffsynth.training.sharding import on_cpu
from diffsynth.training.stopping import (
    CTRL_C,
    EXIT_OF_CTRL_C,
    Stopped,
    Wishes,
    leave_signals_to_the_parent,
)
from diffsynth.training.validation import (
    PromptVideos,
    Validation,
    nothing_left,
    num_held_out,
    split,
    tell_held_out,
)
from diffsynth.training.zero import require_gpu
from diffsynth.video.paths import disk_errors

logger = logging.getLogger("diffsynth")

STOP_TOLD = "Ctrl-C: the run saves after this step and stops. Once more stops at once, without saving."
OPTIMIZER_NUMBERS = 2  # that an optimizer keeps of each weight, for the estimate of a checkpoint's size


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run did."""

    step: int  # done, of all starts of the run
    losses: tuple[float, ...]  # of the steps of this start
    checkpoint: Path | None
    export: Path | None  # the safetensors file, for others to load; of two experts, the high one's
    folder: Path | None  # of logs and checkpoints
    stopped_by: str | None = None  # Ctrl-C, another signal, or the file "stop"
    exit_code: int = 0  # of a program that did nothing else

    def __str__(self) -> str:
        why = f", stopped by {self.stopped_by}" if self.stopped_by else ""
        return f"{self.step} steps{why}; {self.export or self.checkpoint or 'nothing trained'}"


class _Picked(Dataset[tuple[EncodedSample, Pick]]):
    """Samples by pick, for the workers of a DataLoader."""

    def __init__(self, samples: CachedDataset) -> None:
        self._samples = samples

    def __getitem__(self, pick: Pick) -> tuple[EncodedSample, Pick]:  # type: ignore[override]
        return self._samples.picked(pick), pick


def train(config: TrainConfig) -> RunReport:
    """Run what ``config.run.task`` says: fill the cache, train on it, or both.

    Raises:
        ArgumentError: for settings, samples or a checkpoint that do not fit each other.
        NotFiniteError: when the loss is no number; the weights before it are saved.
        OutputPathError: when the disk is full at the end; every checkpoint before is whole.
        DiffSynthError: when a process of the run is lost.
    """
    device = resolved_device(config.model.device)
    require_gpu(config, device)
    ranks = Ranks.of(config, device)
    output = Path(config.run.output)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    if ranks.is_external or ranks.rank == 0:
        check_run(config, _own(device))
    trains, encodes = config.run.task != "data_process", config.run.task != "train"
    group = Group(ranks, device, config.run, encodes=encodes) if trains else None
    # Processes that Lightning starts come here too; the first has filled the cache before it started them.
    if encodes and (ranks.is_external or ranks.rank == 0):
        _fill_cache(config, device, ranks)
    if group is None:
        return RunReport(step=0, losses=(), checkpoint=None, export=None, folder=None)
    group.wait_for_all()  # nobody trains before all have written
    return Run(config, device, ranks).fit()


def _fill_cache(config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
    facts = facts_of(config.model)
    plan = plan_data(config, facts)
    rank, world = (ranks.rank, ranks.world) if ranks.is_external else (0, 1)
    if rank == 0:
        log_plan(plan)
    if 0 < len(plan.clips) <= (config.samples.holdout or 0) and config.samples.every:
        raise nothing_left(config.samples.holdout or 0, len(plan.clips))
    process(plan, encoding_pipeline(config, facts, _own(device)), config.cache, rank=rank, world=world)


def _own(device: torch.device) -> torch.device:
    """The GPU of this process."""
    local = os.environ.get("LOCAL_RANK")
    return device if device.type != "cuda" or local is None else torch.device("cuda", int(local))


class Run:
    """One start of a training run.

    Args:
        config: of the run.
        device: kind of device.
        ranks: the processes.
    """

    def __init__(self, config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
        self.config, self._device, self._ranks = config, device, ranks
        self._output = Path(config.run.output)
        objective = FlowMatchObjective(config.objective)
        path = find_resume(config.run.resume, self._output)
        state = None if path is None else read_state(path)
        self._loaded = load_networks(config, objective)
        for learner in self._loaded.learners:
            learner.tuned.require_format(config.run.export_format)
        plan = plan_data(config, self._loaded.facts)
        if config.run.task == "train" and ranks.rank == 0:  # data_process has told it otherwise
            log_plan(plan)
        self._samples = open_cache(
            plan, self._loaded.facts, maker=maker_of(config, self._loaded.facts),
            cache_dir=config.cache.cache_dir, strict=config.cache.strict, rank=ranks.rank,
            list_folder=self._output,
        )  # fmt: skip
        if device.type == "cuda" and config.run.strategy != "fsdp2" and ranks.rank == 0:
            total = torch.cuda.get_device_properties(device).total_memory
            for line in too_large(config, plan, self._loaded, total / 1e9):
                logger.warning("%s", line)
        num_measured = num_held_out(config.samples, self._samples, {} if state is None else state.facts)
        self._facts = run_facts(config, self._loaded, self._samples, ranks.world, num_measured)
        if path is not None and state is not None:
            require_same_run(path, state, self._facts)
            restore(self._loaded, state)
            logger.info("Going on from %s, after step %d.", path, state.step)
        elif config.run.resume is not None:
            logger.info("There is no checkpoint in %s yet; the run begins.", self._output)
        trained, self._held_out = split(self._samples, num_measured, config.samples.every)
        if ranks.rank == 0:
            tell_held_out(self._samples, trained, self._held_out, config)
        batches = Batches(
            self._samples, size=config.run.batch_size * config.run.accumulate * ranks.world,
            passes=config.run.accumulate * ranks.world, seed=config.run.seed, num_steps=config.run.steps,
            indices=trained, epoch_steps=config.run.steps_per_epoch,
        )  # fmt: skip
        for note in batches.notes:
            logger.warning("%s", note)
        self.folder = version_folder(self._output, path, goes_on=config.run.resume is not None)
        self._agreed = ranks.world == 1  # that this is the folder
        self.module = WanTrainingModule(
            self._loaded.learners, objective, batches, config, start=0 if state is None else state.step,
            optimizer_states=[] if state is None else state.optimizers,
            averages=[] if state is None else state.averages,
            course=None if state is None else course_of(config, state),
        )  # fmt: skip

    def fit(self) -> RunReport:
        """Train to the last step, or until it is stopped."""
        config, module = self.config, self.module
        if module.start >= config.run.steps:
            logger.warning(
                "The checkpoint has %d steps and run.steps is %d: nothing is left to do; give more steps to "
                "train on.", module.start, config.run.steps,
            )  # fmt: skip
            return self._report((), None, None)
        if self._ranks.rank == 0:
            self._prepare_folder()
        names = sorted({self._samples.dataset(index) for index in range(len(self._samples))} - {""})
        log = StepLog(self._samples.dataset if len(names) > 1 else None)
        # Before the first step there is nothing to save; but of several ranks none may leave the others.
        signals = Wishes(
            STOP_TOLD if self._ranks.rank == 0 else "",
            lambda: module.done > module.start or self._ranks.world > 1,
        )
        saver = Saver(self._output, self.save, config.run.save_every, signals)
        callbacks: list[Callback] = [log, saver]
        if config.samples.every:
            sample = PromptVideos(config, self._loaded, self._device) if config.samples.prompts else None
            callbacks.insert(0, Validation(self._samples, self._held_out, log, sample))
        try:
            with signals, quiet_lightning():
                trainer = self._trainer(callbacks, self._loggers(names if len(names) > 1 else []))
                trainer.fit(module, train_dataloaders=self._batches())
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one of the other
            if not signals.is_at_once:
                raise
            raise Stopped(self._kept(saver.saved)) from None
        except RuntimeError as error:
            if self._ranks.world > 1 and is_of_a_lost_rank(error):
                raise lost_rank(config.run, error, last_checkpoint(self.folder)) from error
            raise
        return self._report(tuple(log.losses), saver.saved, saver.stopped_by)

    def _kept(self, saved: tuple[int, Path] | None) -> str:
        """What is left of a run that was stopped at once."""
        last = saved[1] if saved else last_checkpoint(self.folder)
        if last is None:
            return f"Nothing was saved: {self.module.done} steps were done."
        return f"The last checkpoint is {last}; run.resume: latest goes on from there."

    def save(self, module: WanTrainingModule) -> Path:
        """Write a checkpoint and, beside it, the export; every rank takes part, the first one writes."""
        state, is_first = self._state(module), self._ranks.rank == 0
        strategy = module.trainer.strategy
        if not self._agreed:
            # Processes that Lightning started find another number for the folder than the first one took.
            self.folder, self._agreed = strategy.broadcast(self.folder), True
        path = checkpoint_path(self.folder, state)
        failure: OutputPathError | None = None
        for number, learner in enumerate(module.learners):
            target = export_path(path, learner.role or "")
            about = file_metadata(self.config, self._loaded, self._facts, state.step, learner)
            export = partial(learner.tuned.export, target, self.config.run.export_format, about)
            with evaluated(module.plain_optimizers()), module.shown(number), learner.whole(keeps=is_first):
                failure = failure or self._written(export)
        # The state comes last: where it stands, its exports stand beside it.
        failure = failure or self._written(lambda: write_state(path, state))
        # All ranks fail together, when each has done its part: nobody waits for another.
        if (told := strategy.broadcast(None if failure is None else str(failure))) is not None:
            raise failure or OutputPathError(told)
        if is_first:
            drop_old(self.folder, self.config.run.keep_last, path)
            logger.info("Step %d: saved %s", state.step, path)
        return path

    def _written(self, write: Callable[[], object]) -> OutputPathError | None:
        try:
            if self._ranks.rank == 0:
                write()
        except OutputPathError as error:
            return error
        return None

    def _state(self, module: WanTrainingModule) -> State:
        return replace(
            self._state_without_optimizers(),
            optimizers=on_cpu(module.optimizer_states(), keeps=self._ranks.rank == 0),
            averages=[on_cpu(ema.average, keeps=self._ranks.rank == 0) for ema in module.averages],
        )

    def _state_without_optimizers(self) -> State:
        module = self.module
        tensors = {
            learner.prefix + name: on_cpu(parameter, keeps=self._ranks.rank == 0)
            for learner in module.learners
            for name, parameter in learner.parameters().items()
        }
        told = file_metadata(self.config, self._loaded, self._facts, module.done, module.learners[0])
        return State(
            step=module.done, epoch=module.batches.epoch_of(max(0, module.done - 1)), tensors=tensors,
            optimizers=[], averages=[], facts=self._facts, course=asdict(module.course),
            metadata=checkpoint_metadata(self.config, told, list(tensors)),
        )  # fmt: skip

    def _prepare_folder(self) -> None:
        """Leftovers go, rows of steps that come again go, and a save is tried before the first step."""
        places = self.folder / CHECKPOINTS
        num_bytes = sum(
            4 * one.tuned.num_parameters * (1 + OPTIMIZER_NUMBERS + bool(self.config.optimizer.ema))
            for one in self.module.learners
        )
        require_room(places, num_bytes)
        for leftover in places.glob(".part-*"):
            leftover.unlink(missing_ok=True)
        save_config(self.config, self.folder / "config.yaml")
        trial = places / ".trial.ckpt"
        try:
            write_state(trial, replace(self._state_without_optimizers(), metadata={}))
            read_state(trial)
        finally:
            trial.unlink(missing_ok=True)

    def _batches(self) -> DataLoader[Any]:
        run = self.config.run
        sampler = StepSampler(
            self.module.batches, start=self.module.start, stop=run.steps, accumulate=run.accumulate,
            rank=self._ranks.rank, world=self._ranks.world,
        )  # fmt: skip
        return DataLoader(
            _Picked(self._samples), batch_sampler=sampler, collate_fn=_joined, num_workers=run.workers,
            persistent_workers=run.workers > 0, worker_init_fn=leave_signals_to_the_parent,
        )  # fmt: skip

    def _loggers(self, datasets: Sequence[str]) -> list[Logger]:
        num_experts = len(self.module.learners)
        csv_log, events = CsvLog(self.folder, columns(datasets, num_experts)), EventLog(self.folder)
        if self._ranks.rank == 0 and self.config.run.resume is not None:
            csv_log.cut(self.module.start)
            events.begin_again(self.module.start)
        names = self.config.run.loggers if self._ranks.rank == 0 else ()
        return [
            csv_log,
            events,
            *(other_logger(name, self._output, asdict(self.config), self.folder) for name in names),
        ]

    def _trainer(self, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
        return Trainer(
            accelerator="gpu" if self._device.type == "cuda" else "cpu",
            devices=self._ranks.devices,
            num_nodes=self._ranks.nodes,
            strategy=strategy_of(self.config, self._ranks.world, len(self._loaded.learners)),
            precision="32-true",  # networks keep their own dtypes, what trains is float32
            max_epochs=1,
            logger=loggers,
            callbacks=callbacks,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            deterministic=True if self.config.run.deterministic else None,
            default_root_dir=str(self._output),
        )

    def _report(
        self, losses: tuple[float, ...], saved: tuple[int, Path] | None, stopped_by: str | None
    ) -> RunReport:
        path = None if saved is None else saved[1]
        export = None if path is None else export_path(path, self.module.learners[0].role or "")
        # Lightning takes the run for lost when a process that it started ends with anything but 0.
        tells = stopped_by == CTRL_C and (self._ranks.rank == 0 or self._ranks.is_external)
        return RunReport(
            step=self.module.done, losses=losses, checkpoint=path, export=export, folder=self.folder,
            stopped_by=stopped_by, exit_code=EXIT_OF_CTRL_C if tells else 0,
        )  # fmt: skip


def course_of(config: TrainConfig, state: State) -> Course | None:
    """Where the learning rate of a run that goes on follows its schedule; None: over the whole run."""
    if not state.course:
        if config.optimizer.schedule != "constant":
            logger.warning(
                "The checkpoint is of an earlier version and does not tell how many steps its run had: the "
                "learning rate follows its schedule over run.steps %d, and jumps where they were others.",
                config.run.steps,
            )
        return None
    now = OptimizerConfig(**{name: getattr(config.optimizer, name) for name in RATE_SETTINGS})
    told = {**json.loads(state.facts["learning rate"]), **json.loads(state.facts["optimizer settings"])}
    then = OptimizerConfig(**{name: told[name] for name in RATE_SETTINGS})
    return resumed_course(Course(**state.course), state.step, now, then, config.run.steps)  # type: ignore[arg-type]


def _joined(pairs: Sequence[tuple[EncodedSample, Pick]]) -> Drawn:
    picks = tuple(pick for _, pick in pairs)
    batch = collate([sample for sample, _ in pairs], [pick.drops_caption for pick in picks])
    return Drawn(batch=batch, picks=picks)

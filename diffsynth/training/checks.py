"""What would stop a run later is looked for before its first clip is encoded.

Encoding may take hours. Networks are looked at as outlines, told by the headers of their files; nothing is
loaded, and nothing but the optimizer's own code computes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from diffsynth.errors import ArgumentError, DiffSynthError, OutputPathError
from diffsynth.pipelines.request import read_request
from diffsynth.training.checkpoints import find_resume, read_state, require_same_run
from diffsynth.training.config import TrainConfig
from diffsynth.training.loading import Loaded, load_networks, method_of, model_files, restore
from diffsynth.training.logs import require_logger
from diffsynth.training.module import require_same_names
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.optimizers import try_optimizer
from diffsynth.training.validation import arguments_of, sampling_parts
from diffsynth.video.paths import why_not_writable

logger = logging.getLogger("diffsynth")


def check_run(config: TrainConfig, device: torch.device) -> None:
    """Make sure that a run can be made of its settings.

    Args:
        config: of the run.
        device: of this process.

    Raises:
        DiffSynthError: what would be raised later, by whatever reads the setting.
    """
    output = Path(config.run.output)
    if reason := why_not_writable(output):
        raise OutputPathError(
            f"run.output is {output}, where no file can be written ({reason}); give another folder."
        )
    try_optimizer(config.optimizer, device)
    for name in config.run.loggers:
        require_logger(name)
    checkpoint = find_resume(config.run.resume, output)
    videos = range(len(config.samples.prompts) if config.samples.every else 0)
    if config.samples.prompts and not videos:
        logger.warning("samples.prompts are not made into videos: samples.every is 0.")
    for number in videos:
        with _about_sample(number):
            arguments_of(config.samples, number)
    # What only trains stops at once at whatever is wrong with its networks; its videos come later.
    if not config.model.dit or (config.run.task == "train" and not videos):
        return
    # Weights that are drawn anew are of no use here, and take the memory of the whole network.
    outline = replace(config, tune=replace(config.tune, fresh=False))
    loaded = load_networks(outline, FlowMatchObjective(config.objective), outline=True)
    for learner in loaded.learners:
        learner.tuned.require_format(config.run.export_format)
    if checkpoint is not None:
        _check_resume(checkpoint, config, loaded)
    if videos:
        _check_videos(config, loaded)


def _check_resume(checkpoint: Path, config: TrainConfig, loaded: Loaded) -> None:
    state = read_state(checkpoint, mapped=True)
    known = {"method": method_of(config), "optimizer": config.optimizer.name}
    if loaded.identity:
        known |= {"model": loaded.identity, "model files": model_files(config)}
    require_same_run(checkpoint, state, known, quiet=True)
    restore(loaded, state)
    for saved, learner in zip(state.optimizers, loaded.learners, strict=False):
        require_same_names(saved, list(learner.parameters()))


def _check_videos(config: TrainConfig, loaded: Loaded) -> None:
    if config.run.strategy == "fsdp2":
        raise ArgumentError("samples.prompts needs a whole DiT on each GPU, which fsdp2 shards; use ddp.")
    parts = sampling_parts(config, loaded, torch.device("cpu"), outline=True)
    for number in range(len(config.samples.prompts)):
        with _about_sample(number):
            read_request(arguments_of(config.samples, number), parts, "official")


@contextmanager
def _about_sample(number: int) -> Iterator[None]:
    """Say of an error of ``pipe()`` which setting it is about."""
    try:
        yield
    except DiffSynthError as error:
        raise ArgumentError(f"Sample video {number + 1} (section samples) cannot be made: {error}") from error

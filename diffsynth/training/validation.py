"""What a run shows of itself: the loss on clips that it never trains on, and videos of the same prompts.

The validation loss is measured with the same noise at the same quantiles of the noise levels every time, so
that it moves only when the weights do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from diffsynth.errors import ArgumentError, MissingModelError, OutputPathError
from diffsynth.models.model_manager import ModelManager
from diffsynth.pipelines.components import PipelineComponents, check_sizes, collect
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.training.batches import Samples, chance
from diffsynth.training.cached_dataset import CachedDataset
from diffsynth.training.callbacks import StepLog, write_rows
from diffsynth.training.config import SampleConfig, TrainConfig
from diffsynth.training.dataset.items import LIST_PREFIX
from diffsynth.training.dataset.planning import write_list
from diffsynth.training.loading import Loaded, encoder_dtype, model_fps
from diffsynth.training.module import WanTrainingModule
from diffsynth.training.optimizers import evaluated
from diffsynth.training.samples import collate
from diffsynth.video import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("diffsynth")

FILES_PER_HELD_OUT = 20  # 5 % of the files are measured, unless the user says how many samples
HELD_OUT = f"{LIST_PREFIX}held_out.txt"
MAX_NAMED = 20  # files in one line of the log
STEP_OF_VALIDATION = -1  # its noise is that of no step of training
Sampling = Callable[[WanTrainingModule, int], None]


def num_held_out(settings: SampleConfig, samples: Samples, before: Mapping[str, str]) -> int:
    """How many samples are measured and never trained on.

    Args:
        settings: of the run.
        samples: all cached samples.
        before: facts of the run that this one goes on with: it keeps its number.
    """
    if not settings.every:
        return 0
    if settings.holdout is not None:
        return settings.holdout
    if "held out" in before:
        return int(before["held out"])
    if settings.prompts:  # there is something to look at
        return 0
    return len({samples.source(index) for index in range(len(samples))}) // FILES_PER_HELD_OUT


def split(samples: Samples, holdout: int, every: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices to measure; which is which depends on the samples' ids alone.

    Other samples of the files that are measured (further clips of a video, the same in another dataset) are
    neither: what is measured was never seen.

    Raises:
        ArgumentError: when nothing would be left to train on.
    """
    count = holdout if every else 0
    order = sorted(range(len(samples)), key=lambda i: chance(samples.sample_id(i), "holdout"))
    held_out = order[:count]
    measured = {samples.source(index) for index in held_out}
    trained = sorted(index for index in order[count:] if samples.source(index) not in measured)
    if not trained and len(samples):
        raise nothing_left(count, len(samples))
    return trained, held_out


def nothing_left(count: int, num_samples: int) -> ArgumentError:
    """The error of a run that would hold out all it has."""
    return ArgumentError(
        f"samples.holdout is {count} and there are {num_samples} samples, and none of another file is left "
        "to train on; hold out fewer, or 0."
    )


def tell_held_out(
    samples: CachedDataset, trained: Sequence[int], held_out: Sequence[int], config: TrainConfig
) -> None:
    """Name the files that are measured instead of trained on; more than fit into a line stand in a file."""
    every = config.samples.every
    if every and not held_out and not config.samples.prompts:
        logger.warning(
            "samples.every is %d, and there is nothing to look at: no clip is held out (of fewer than %d "
            "files none is). Give samples.holdout, or samples.prompts.", every, FILES_PER_HELD_OUT,
        )  # fmt: skip
    if not held_out:
        return
    names = list(dict.fromkeys(samples.media(index) for index in held_out))
    listed = ""
    if len(names) > MAX_NAMED:
        file = write_list(names, Path(config.run.output), HELD_OUT)
        listed = f" ... (all: {file})"
    logger.info(
        "Held out, to be measured every %d steps and never trained on: %d files: %s%s. %d of %d clips are "
        "trained on.", every, len(names), ", ".join(names[:MAX_NAMED]), listed, len(trained), len(samples),
    )  # fmt: skip


class Validation(Callback):
    """Every so many steps, before the first and after the last one.

    Args:
        samples: all cached samples.
        held_out: which of them are measured.
        log: takes the loss into its row.
        sample: makes the videos, if there shall be any.
    """

    def __init__(
        self, samples: CachedDataset, held_out: Sequence[int], log: StepLog, sample: Sampling | None = None
    ) -> None:
        self._samples, self._held_out, self._log, self._sample = samples, list(held_out), log, sample

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, WanTrainingModule)
        if pl_module.start == 0:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, WanTrainingModule)
        every, last = pl_module.config.samples.every, pl_module.config.run.steps
        if pl_module.report is not None and (pl_module.done % every == 0 or pl_module.done == last):
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: WanTrainingModule) -> None:
        with torch.no_grad(), evaluated(module.plain_optimizers()), ExitStack() as stack:
            for number in range(len(module.learners)):
                stack.enter_context(module.shown(number))
            stack.callback(module.reshard)
            if self._held_out:
                by_quantile = validation_losses(module, self._samples, self._held_out)
                if module.done > module.start:  # before the first step there is no row for it
                    self._log.validation_loss = float(by_quantile.mean())
                rows = {
                    f"validation_loss_q{q:g}": float(loss)
                    for q, loss in zip(module.config.samples.quantiles, by_quantile, strict=True)
                }
                write_rows(trainer, rows, module.done)
            if self._sample is not None:
                self._sample(module, module.done)


def validation_losses(module: WanTrainingModule, samples: CachedDataset, held_out: Sequence[int]) -> Tensor:
    """Mean loss at each quantile, (quantiles,), the same on every rank.

    Each rank measures every so many of the samples. All ranks take the same number of passes, as sharded
    weights want; a pass too many counts nothing.
    """
    rank, world = module.global_rank, module.trainer.world_size
    quantiles = module.config.samples.quantiles
    sums = torch.zeros(len(quantiles), device=module.device)
    rounds = range(0, len(held_out), world)
    for first in tqdm(rounds, desc="validation", unit="sample", leave=False, disable=rank != 0):
        place = first + rank
        index = held_out[min(place, len(held_out) - 1)]
        batch = collate([samples[index]], [False])
        for number, quantile in enumerate(quantiles):
            learner = module.learners[0]
            low, high = (0.0, 1000.0) if len(module.learners) > 1 else (learner.low, learner.high)
            sigma = module.objective.sigma_at(min(quantile, 1 - 1e-9), low, high)
            if len(module.learners) > 1:
                learner = next(one for one in module.learners if one.low <= sigma * 1000)
            losses, _ = module.losses(
                learner, batch, STEP_OF_VALIDATION, [samples.sample_id(index)], sigma=sigma,
                seed=module.config.samples.seed,
            )  # fmt: skip
            if place < len(held_out):
                sums[number] += losses[0]
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return (sums / len(held_out)).cpu()


class PromptVideos:
    """Videos of the same prompts and seeds, spread over the ranks.

    Args:
        config: names prompts and encoders.
        loaded: the networks that train.
        device: where everything computes.

    Raises:
        MissingModelError: without a text encoder or a VAE.
        ArgumentError: under FSDP2, where no rank holds a whole DiT.
    """

    def __init__(self, config: TrainConfig, loaded: Loaded, device: torch.device) -> None:
        sources = config.model
        if sources.text_encoder is None or sources.vae is None:
            raise MissingModelError(
                "samples.prompts needs model.text_encoder and model.vae; name their files."
            )
        if config.run.strategy == "fsdp2":
            raise ArgumentError("samples.prompts needs a whole DiT on each GPU, which fsdp2 shards; use ddp.")
        self._config, self._loaded, self._device = config, loaded, device
        self._pipe: WanVideoPipeline | None = None

    def __call__(self, module: WanTrainingModule, step: int) -> None:
        """Make the videos of this rank: ``<output>/samples/step=S-N.mp4``."""
        from diffsynth.video import save_video

        # Now and not before: a pipeline lets its networks rest where they were when it was made.
        self._pipe = self._pipe or self._made()
        module.placing.rest()
        settings = self._config.samples
        folder = Path(self._config.run.output) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(module.global_rank, len(settings.prompts), module.trainer.world_size):
            video = self._pipe(**arguments_of(settings, number))
            assert isinstance(video, list)
            path = folder / f"step={step}-{number + 1}.mp4"
            try:
                save_video(cast("list[Image]", video), path, fps=model_fps(self._loaded.facts))
            except OutputPathError as error:
                logger.error("No sample video at step %d, and training goes on. %s", step, error)
        logger.info("Step %d: videos of %d prompts in %s", step, len(settings.prompts), folder)

    def _made(self) -> WanVideoPipeline:
        return WanVideoPipeline(sampling_parts(self._config, self._loaded, self._device))


def arguments_of(settings: SampleConfig, number: int) -> dict[str, Any]:
    """What ``pipe()`` is given for one of the prompts.

    Raises:
        MediaNotFoundError, MediaReadError: for its picture.
    """
    names = ("height", "width", "num_frames", "num_inference_steps", "cfg_scale")
    given = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if settings.input_images:
        given["input_image"] = load_image(settings.input_images[number])
    return {
        "prompt": settings.prompts[number], "negative_prompt": settings.negative_prompt,
        "seed": settings.seed + number, **given,
    }  # fmt: skip


def sampling_parts(
    config: TrainConfig, loaded: Loaded, device: torch.device, *, outline: bool = False
) -> PipelineComponents:
    """The parts of a pipeline for sample videos: the networks that train, with encoders beside them.

    Args:
        config: names the encoders.
        loaded: the networks that train.
        device: where everything computes.
        outline: of the encoders, headers are read instead of weights.

    Raises:
        MissingModelError: without a text encoder or a VAE.
        ConfigurationError: when they do not belong to the DiT.
    """
    sources, own = config.model, loaded.parts
    if sources.text_encoder is None or sources.vae is None:
        raise MissingModelError("samples.prompts needs model.text_encoder and model.vae; name their files.")
    dtype = encoder_dtype(sources)
    manager = ModelManager(torch_dtype=dtype, device="meta" if outline else "cpu")
    paths = [sources.text_encoder, sources.vae, sources.image_encoder]
    manager.load_models([path for path in paths if path is not None])
    parts = collect(manager, device=device, dtype=dtype, tokenizer_path=sources.tokenizer)
    parts.high, parts.low, parts.boundary = own.high, own.low, own.boundary
    parts.family, parts.generation = own.family, own.generation
    parts.sources.update({name: file for name, file in own.sources.items() if name not in parts.sources})
    check_sizes(parts)
    return parts

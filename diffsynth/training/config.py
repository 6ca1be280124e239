"""Everything that decides a training run, in one place: what YAML holds, what flags change, what is saved.

The sections of other modules stand beside the code that reads them; here is the whole, and what the run
itself reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from diffsynth.errors import ArgumentError
from diffsynth.training.cache_config import CacheConfig
from diffsynth.training.dataset.config import DatasetConfig
from diffsynth.training.objective import ObjectiveConfig
from diffsynth.training.tuning import WITH_FACTORS, TuneConfig

Schedule = Literal["constant", "linear", "cosine", "cosine_restarts", "decay"]
Strategy = Literal["auto", "ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2"]
ZERO_STAGES = {"deepspeed_stage_1": 1, "deepspeed_stage_2": 2}
# Optimizers that treat each number by itself: a piece of a long vector is as good to them as a whole weight.
ELEMENTWISE = (
    "adamw",
    "sgd",
    "torch.optim.AdamW",
    "torch.optim.Adam",
    "torch.optim.SGD",
    "torch.optim.RMSprop",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSources:
    """The files of the model."""

    dit: tuple[str, ...] = ()  # file, folder or shards of the DiT that is trained
    dit_low: tuple[str, ...] = ()  # of the low-noise expert, where a model has two; both are trained
    adapters: tuple[str, ...] = ()  # files of networks beside it (VACE, speed), where they are not in its own
    text_encoder: str | None = None  # for data_process and for sample videos
    vae: str | None = None  # for data_process and for sample videos
    image_encoder: str | None = None  # for data_process of image-to-video models with a CLIP branch
    tokenizer: str | None = None  # folder, where it does not lie beside the text encoder
    dtype: Literal["bfloat16", "float16", "float32", "fp8"] = "bfloat16"  # of weights that are not trained
    device: str | None = None  # "cuda", "cpu"; none: a GPU if there is one


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """What is traded for memory."""

    gradient_checkpointing: Literal["none", "full", "keep_attention"] = "none"  # see `recompute`
    offload: bool = False  # of what checkpointing keeps: it waits in host memory
    stream: bool = False  # frozen weights rest in host memory and come in for each pass; needs checkpointing
    compile: bool = False  # torch.compile of each block
    # Of two experts, where the frozen weights of the one that is not in turn are; read without stream and
    # fsdp2. "disk": in the files that they were loaded from.
    idle_expert: Literal["device", "ram", "disk"] = "ram"

    def __post_init__(self) -> None:
        for name in ("offload", "stream"):
            if getattr(self, name) and self.gradient_checkpointing == "none":
                raise ArgumentError(
                    f"memory.{name} is on and gradient_checkpointing off, on which it rests; set "
                    "memory.gradient_checkpointing to full or keep_attention."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """What the two experts of a Wan2.2 A14B model do not share, and which one trains alone."""

    # Without model.dit_low: which expert model.dit is, and so at which timesteps it trains; none: as its
    # metadata or its path says. "all": at all of them.
    role: Literal["high", "low", "all"] | None = None
    boundary: float | None = None  # share of 1000: the high-noise expert from there on; none: the model's
    turn: int = 1  # steps that an expert has at a time; more, and the experts change places less often
    high_share: float | None = None  # of the turns, for the high-noise expert; none: that of its noise levels
    low_learning_rate: float | None = None  # of the low-noise expert; none: optimizer.learning_rate
    low_rank: int | None = None  # of its factors, alpha / rank staying as it is; none: tune.rank

    def __post_init__(self) -> None:
        if self.role not in (None, "high", "low", "all"):
            raise ArgumentError(f"experts.role is {self.role!r}; give high, low or all.")
        for name in ("boundary", "high_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ArgumentError(f"experts.{name} is {value}; give a number between 0 and 1.")
        _at_least(self.turn, 1, "experts.turn")
        if self.low_rank is not None:
            _at_least(self.low_rank, 1, "experts.low_rank")
        if self.low_learning_rate is not None:
            _above(self.low_learning_rate, 0, "experts.low_learning_rate", "1e-4 is usual for a LoRA")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How the weights follow their gradients."""

    # adamw, sgd, adamw8bit, prodigy, schedule_free, or a dotted name such as torch.optim.Adafactor
    name: str = "adamw"
    learning_rate: float = 1e-4  # at its highest; Prodigy wants 1
    options: Mapping[str, object] = field(
        default_factory=dict
    )  # more of its arguments, such as weight_decay: 0.01
    schedule: Schedule = "constant"  # after the warm-up; "decay" falls over the last fifth of the steps
    warmup_steps: int = 0  # steps over which the learning rate rises
    restarts: int = 1  # of cosine_restarts: waves until the end
    final_share: float = 0.0  # of the learning rate at the last step, for all but "constant"
    clip_norm: float = 1.0  # gradients are scaled down to this norm; 0 leaves them
    ema: float = 0.0  # share of the moving average that a step keeps, such as 0.999; 0 keeps no average

    def __post_init__(self) -> None:
        _above(self.learning_rate, 0, "learning_rate", "1e-4 is usual for a LoRA, 1e-5 for all weights")
        _at_least(self.warmup_steps, 0, "warmup_steps")
        _at_least(self.restarts, 1, "restarts")
        _at_least(self.clip_norm, 0, "clip_norm")
        _share(self.final_share, "final_share")
        if not 0 <= self.ema < 1:
            raise ArgumentError(
                f"optimizer.ema is {self.ema}; give 0 (none) or a share below 1, such as 0.999."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the run writes, how long it is, and on what it runs."""

    task: Literal["data_process", "train", "both"] = "both"  # data_process fills the cache, train reads it
    output: str = "output"  # folder of logs, checkpoints and samples
    steps: int = 1000  # of the optimizer
    batch_size: int = 1  # samples of one pass on one GPU
    accumulate: int = 1  # passes of a step
    # Steps of an epoch, in names of checkpoints and in logs; 0: until every clip had its repeats.
    steps_per_epoch: int = 0
    seed: int = 0  # of order, noise, noise levels and caption dropout
    deterministic: bool = False  # only kernels that give the same bits each time; slower
    workers: int = 1  # processes that read cached samples; 0 reads in the training process
    resume: str | None = None  # a .ckpt to go on from, or "latest": that of this output, if there is one
    start_from: str | None = None  # a LoRA, or a .ckpt, whose weights are taken and nothing else
    save_every: int = 500  # steps; 0: at the end only
    keep_last: int = 3  # checkpoints that are kept; 0: all
    # Names in the LoRA beside each checkpoint.
    export_format: Literal["comfy", "kohya", "diffusers", "peft"] = "comfy"
    trigger: str = ""  # word that calls what was taught; goes into the metadata
    loggers: tuple[str, ...] = ()  # besides CSV and TensorBoard: wandb, swanlab
    devices: int = 0  # processes on this machine; 0: every GPU, or one process on the CPU
    nodes: int = 1  # machines; start it on each with torchrun
    # auto: one process, or ddp. fsdp2 shards the weights over the GPUs, deepspeed_stage_1 what an optimizer
    # keeps, deepspeed_stage_2 the gradients too.
    strategy: Strategy = "auto"
    timeout_s: float = 1800.0  # how long a process waits for the others before it gives up

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "nodes"):
            _at_least(getattr(self, name), 1, name)
        for name in ("workers", "save_every", "keep_last", "devices", "seed", "steps_per_epoch"):
            _at_least(getattr(self, name), 0, name)
        _above(self.timeout_s, 0, "timeout_s", "1800 is half an hour")
        if self.output.startswith("~"):  # once, for all who read it
            object.__setattr__(self, "output", str(Path(self.output).expanduser()))
        if self.resume is not None and self.start_from is not None:
            raise ArgumentError(
                "run.resume goes on with a run and run.start_from begins a new one; give one of them."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """What is looked at while it trains: the loss on held-out clips, and videos."""

    every: int = 0  # steps between two validations; 0: none
    # Cached samples that are never trained on and measured instead; none: 5 % of the files, of fewer than 20
    # files none, and none where there are prompts; a run that goes on keeps its number.
    holdout: int | None = None
    # At which the loss is measured: shares of the noise levels that training draws, from the noisiest.
    quantiles: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    prompts: tuple[str, ...] = ()  # of videos at each validation; needs model.text_encoder and model.vae
    input_images: tuple[str, ...] = ()  # one for each prompt, of an image-to-video model: files
    negative_prompt: str = ""  # of those videos
    seed: int = 0  # of those videos, and of the noise of the validation loss
    height: int | None = None  # pixels; none: the model's
    width: int | None = None  # pixels; none: the model's
    num_frames: int | None = None  # 4 k + 1; none: the model's
    num_inference_steps: int | None = None  # none: the model's
    cfg_scale: float | None = None  # none: the model's

    def __post_init__(self) -> None:
        _at_least(self.every, 0, "every")
        _at_least(self.holdout or 0, 0, "holdout")
        if not self.quantiles:
            raise ArgumentError("samples.quantiles is empty; give shares of the noise levels, such as 0.5.")
        for quantile in self.quantiles:
            _share(quantile, "quantiles")
        if self.input_images and len(self.input_images) != len(self.prompts):
            raise ArgumentError(
                f"samples.input_images names {len(self.input_images)} pictures for {len(self.prompts)} "
                "prompts; give one for each."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    model: ModelSources = field(default_factory=ModelSources)
    data: tuple[DatasetConfig, ...] = ()
    cache: CacheConfig = field(default_factory=CacheConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if self.run.task != "data_process" and not self.model.dit:
            low = " For the low-noise expert alone too: model.dit, and experts.role low."
            raise ArgumentError(
                f"model.dit is empty; name the file of the DiT to train.{low if self.model.dit_low else ''}"
            )
        self._check_experts()
        if self.memory.stream and self.run.strategy == "fsdp2":
            raise ArgumentError(
                "memory.stream keeps the weights in host memory and run.strategy fsdp2 shards them over the "
                "GPUs; choose one (ddp streams on every GPU)."
            )
        if self.run.strategy == "fsdp2" and (self.tune.kind == "dora" or self.tune.rounding == "stochastic"):
            raise ArgumentError(
                "run.strategy fsdp2 goes neither with tune.kind dora, which reads whole weights, nor with "
                "tune.rounding stochastic; use ddp, or lora with masters."
            )
        if self.run.strategy in ZERO_STAGES:
            self._check_deepspeed()
        if self.tune.rounding == "stochastic" and self.optimizer.name.startswith(("prodigy", "schedule")):
            raise ArgumentError(
                f"optimizer.name is {self.optimizer.name!r}, which looks at all weights at once, and "
                "tune.rounding stochastic steps some at a time; use masters, or adamw."
            )
        if not self.data:
            raise ArgumentError("data is empty; name a dataset: --data.0.path FOLDER.")

    def _check_deepspeed(self) -> None:
        if self.model.dit_low or self.tune.rounding == "stochastic" or self.optimizer.name not in ELEMENTWISE:
            raise ArgumentError(
                f"run.strategy {self.run.strategy} steps one optimizer on pieces of a long vector: it goes "
                "neither with two experts (model.dit_low), nor with tune.rounding stochastic, nor with "
                f"optimizers other than {', '.join(ELEMENTWISE)} (optimizer.name is "
                f"{self.optimizer.name!r}); use ddp or fsdp2."
            )

    def _check_experts(self) -> None:
        of_one = replace(ExpertsConfig(), role=self.experts.role, boundary=self.experts.boundary)
        if not self.model.dit_low and self.experts != of_one and self.run.task != "data_process":
            raise ArgumentError(
                "The section experts is for two, but for role and boundary, and model.dit_low is empty; name "
                "the low-noise expert's file there, or leave the rest out."
            )
        if self.model.dit_low and self.experts.role is not None:
            raise ArgumentError(
                f"experts.role is {self.experts.role!r}, for one expert that trains alone, and model.dit_low "
                "names a second; leave one of them out."
            )
        if self.experts.low_rank is not None and self.tune.kind not in WITH_FACTORS:
            raise ArgumentError(
                f"experts.low_rank is {self.experts.low_rank} and tune.kind {self.tune.kind!r} has no rank; "
                "leave it out."
            )
        if self.memory.idle_expert == "disk" and (self.memory.stream or self.run.strategy == "fsdp2"):
            raise ArgumentError(
                "memory.idle_expert is 'disk', and memory.stream and fsdp2 say themselves where weights are; "
                "leave one of them out."
            )


def _at_least(value: float, least: float, name: str) -> None:
    if value < least:
        raise ArgumentError(f"{name} is {value}; give {least:g} or more.")


def _above(value: float, limit: float, name: str, usual: str) -> None:
    if not value > limit:
        raise ArgumentError(f"{name} is {value}; give a number above {limit:g} ({usual}).")


def _share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ArgumentError(f"{name} is {value}; give 0 to 1.")

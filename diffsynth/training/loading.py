"""From the files that a config names to what trains, what encodes and what is trained on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.checkpoints.build import load_class
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.files import group_files
from diffsynth.checkpoints.hints import Role
from diffsynth.checkpoints.pairs import is_dit, roles_of
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.text_cache import fingerprint
from diffsynth.denoising.expert import Expert
from diffsynth.errors import (
    ArgumentError,
    CheckpointNotFoundError,
    MissingModelError,
    TokenizerNotFoundError,
)
from diffsynth.lora.formats import open_loras
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.wan.dit_config import VAE22_CHANNELS
from diffsynth.models.wan.facts import facts_in
from diffsynth.ops.devices import known_device
from diffsynth.pipelines.components import ENCODERS, PipelineComponents, collect
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.training.cache_facts import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, TI2V_5B, assuming
from diffsynth.training.cache_keys import Maker, encoder_identity, facts_of_settings, told_encoders
from diffsynth.training.cached_dataset import CachedDataset
from diffsynth.training.checkpoints import State
from diffsynth.training.config import ExpertsConfig, ModelSources, TrainConfig
from diffsynth.training.dataset.clips import DatasetPlan
from diffsynth.training.dataset.planning import plan_dataset
from diffsynth.training.learners import Denoiser, Learner
from diffsynth.training.objective import FlowMatchObjective
from diffsynth.training.tuning import WITH_FACTORS, TuneConfig, Tuned, tune

logger = logging.getLogger("diffsynth")

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
FPS, FPS_22 = 16.0, 24.0  # of the videos that the models were made with: Wan2.1 and A14B; TI2V-5B
QUANTILES = 1000
_OF_THE_RATE = ("schedule", "warmup_steps", "restarts", "final_share", "clip_norm", "ema")


@dataclass(kw_only=True)
class Loaded:
    """The networks of a training run, and what says which they are."""

    parts: PipelineComponents
    learners: list[Learner]
    facts: DiTFacts
    identity: str  # hash of names, shapes and sampled bytes of every network; "": an outline, not asked for
    metadata: Mapping[str, str]  # of the DiT's file

    @property
    def experts(self) -> list[Expert]:
        return [one for one in (self.parts.high, self.parts.low) if one is not None]


def resolved_device(asked: str | None) -> torch.device:
    """The device that is meant; None is a GPU if there is one."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return known_device(asked, "model.device")


def facts_of(sources: ModelSources) -> DiTFacts:
    """What the DiT reads, by the headers of its files: nothing is loaded.

    Without a DiT the encoders tell for which model clips are encoded.
    """
    if not sources.dit:
        if sources.image_encoder is not None:
            return IMAGE_TO_VIDEO
        return TI2V_5B if _is_vae22(sources.vae) else TEXT_TO_VIDEO
    matches = detect(Checkpoint.open(list(sources.dit)), ARCHITECTURES)
    for path in sources.adapters:
        matches += detect(Checkpoint.open(path), ARCHITECTURES)
    for match in matches:
        load_class(match)  # raises for a network that is not built yet
    facts = facts_in(matches)
    if facts is None:
        raise MissingModelError(f"{', '.join(sources.dit)} holds no DiT; model.dit names the file of one.")
    return facts


def _is_vae22(path: str | None) -> bool:
    if path is None or not Path(path).expanduser().exists():  # loading it says so
        return False
    found = [match for match in detect(Checkpoint.open(path), ARCHITECTURES) if match.name == "wan_video_vae"]
    return any(match.config.get("z_dim") == VAE22_CHANNELS for match in found)


def model_fps(facts: DiTFacts) -> float:
    """Frames per second that the model was made with."""
    return FPS_22 if facts.latent_channels == VAE22_CHANNELS else FPS


def plan_data(config: TrainConfig, facts: DiTFacts) -> DatasetPlan:
    """Which clips are made of the data, for this model's rate and grid."""
    stride = facts.spatial_stride
    output = Path(config.run.output)
    return plan_dataset(
        config.data, model_fps=model_fps(facts),
        grid=(stride * facts.patch[0], stride * facts.patch[1]), list_folder=output,
    )  # fmt: skip


def maker_of(config: TrainConfig, facts: DiTFacts) -> Maker:
    """How this run encodes, told by the encoders' files: headers and some bytes of them are read.

    Files that are not named, or not on this machine, leave open what they decide: training needs no encoder.
    """
    sources, paths = config.model, []
    for name in ("text_encoder", "vae", "image_encoder"):
        path = getattr(sources, name)
        try:
            if path is not None and group_files(path):
                paths.append(path)
        except CheckpointNotFoundError as error:
            logger.info("Which samples are this run's is told without model.%s: %s", name, error)
    manager = ModelManager(torch_dtype=encoder_dtype(sources), device="meta")
    if paths:
        manager.load_models(paths)
    found = {} if facts.image_dim is not None else {"image_encoder": ""}
    for entry in manager.loaded:
        if (name := entry.match.architecture.part) in ENCODERS and name not in found:
            read = partial(entry.match.checkpoint.tensor, dtype=manager.torch_dtype)
            found[name] = encoder_identity(entry.model, read)
    facts_known = {**found, **facts_of_settings(facts, config.cache)}
    try:
        parts = collect(
            manager,
            device=torch.device("cpu"),
            dtype=encoder_dtype(sources),
            tokenizer_path=sources.tokenizer,
        )
    except TokenizerNotFoundError as error:
        logger.info("Which samples are this run's is told without the tokenizer: %s", error)
        return Maker(facts=facts_known)
    return Maker(facts=facts_known, tokenizer=parts.tokenizer, about=told_encoders(parts))


def encoder_dtype(sources: ModelSources) -> torch.dtype:
    """Of the encoders' weights, which are never kept in fp8."""
    return torch.bfloat16 if sources.dtype == "fp8" else DTYPES[sources.dtype]


def encoding_pipeline(config: TrainConfig, facts: DiTFacts, device: torch.device) -> WanVideoPipeline:
    """The encoders alone, encoding as if the DiT were there.

    Raises:
        MissingModelError: without a text encoder or a VAE.
    """
    sources = config.model
    for name in ("text_encoder", "vae"):
        if getattr(sources, name) is None:
            raise MissingModelError(
                f"data_process encodes with model.{name}, which is not given; name its file."
            )
    dtype = encoder_dtype(sources)
    manager = ModelManager(torch_dtype=dtype, device="cpu")
    paths = [sources.text_encoder, sources.vae, sources.image_encoder]
    manager.load_models([path for path in paths if path is not None])
    parts = collect(manager, device=device, dtype=dtype, tokenizer_path=sources.tokenizer)
    return WanVideoPipeline(assuming(parts, facts))


def load_networks(config: TrainConfig, objective: FlowMatchObjective, *, outline: bool = False) -> Loaded:
    """Load the DiT, or both experts, with their adapters, on the CPU, and choose what trains.

    Args:
        config: names them.
        objective: of the run.
        outline: read headers instead of weights: to see whether the run can be made.

    Raises:
        ArgumentError: when the files hold another number of DiTs than is named.
    """
    sources = config.model
    manager = ModelManager(torch_dtype=DTYPES[sources.dtype], device="meta" if outline else "cpu")
    named = [group for group in (sources.dit, sources.dit_low) if group]
    manager.load_models([*(g[0] if len(g) == 1 else list(g) for g in named), *sources.adapters])
    dits = [entry for entry in manager.loaded if is_dit(entry.match)]
    if len(dits) != len(named):
        raise ArgumentError(
            f"The files of model.dit and model.dit_low hold {len(dits)} DiTs; expected {len(named)}: one in "
            "each, the high-noise expert in model.dit and the low-noise one in model.dit_low."
        )
    dtype = manager.torch_dtype or torch.bfloat16
    pair = [entry.paths[0] for entry in dits] if len(dits) > 1 else None
    if pair and roles_of([entry.match for entry in dits]) != ("high", "low"):
        raise ArgumentError(
            f"model.dit is {pair[0]} and model.dit_low {pair[1]}, which say the opposite of themselves: "
            "model.dit is the high-noise expert. Exchange them."
        )
    parts = collect(manager, device=torch.device("cpu"), dtype=dtype, dit=pair)
    assert parts.high is not None
    if config.experts.boundary is not None:
        parts.boundary = config.experts.boundary
    # Before anything is put beside the weights.
    is_asked = not outline or (config.run.resume is not None and sources.dtype != "fp8")
    identity = _identity_of(parts, manager) if is_asked else ""
    learners = _learners(parts, config, objective)
    if len(learners) == 1 and not outline:
        _tell_of_role(learners[0], config)
    return Loaded(
        parts=parts, learners=learners, identity=identity,
        facts=parts.facts, metadata=dits[0].match.checkpoint.metadata,
    )  # fmt: skip


def _identity_of(parts: PipelineComponents, manager: ModelManager) -> str:
    """Hash of every network; of outlines, of what their files hold."""
    readers: dict[int, Callable[[str], Tensor]] = {}
    if manager.device.type == "meta":
        dtype = manager.torch_dtype
        readers = {id(e.model): partial(e.match.checkpoint.tensor, dtype=dtype) for e in manager.loaded}
    networks = [n for one in (parts.high, parts.low) if one is not None for n in (one.dit, *one.adapters)]
    told = b"".join(fingerprint(network, readers.get(id(network))) for network in networks)
    return hashlib.sha256(told).hexdigest()[:16]


def _learners(parts: PipelineComponents, config: TrainConfig, objective: FlowMatchObjective) -> list[Learner]:
    assert parts.high is not None
    experts = [one for one in (parts.high, parts.low) if one is not None]
    configs = [config.tune] if len(experts) == 1 else [config.tune, tune_of_low(config)]
    tuned = [tune(e.dit, e.adapters, one) for e, one in zip(experts, configs, strict=True)]
    if config.run.start_from is not None:
        _start_from(Path(config.run.start_from), tuned)
    rate = config.optimizer.learning_rate
    limit = parts.boundary * 1000
    if len(experts) == 1:
        role = _role_alone(parts, config)
        low, high = {"high": (limit, 1000.0), "low": (0.0, limit)}.get(role or "", (0.0, 1000.0))
        objective.sigma_at(0.5, low, high)  # raises where it would never be asked
        return [
            Learner(
                denoiser=Denoiser(experts[0]), tuned=tuned[0], low=low, high=high, learning_rate=rate,
                role=role,
            )
        ]  # fmt: skip
    for low, high in ((limit, 1000.0), (0.0, limit)):  # raises where an expert would never be asked
        objective.sigma_at(0.5, low, high)
    levels = [objective.sigma_at((i + 0.5) / QUANTILES) * 1000 for i in range(QUANTILES)]
    share = config.experts.high_share or sum(level >= limit for level in levels) / QUANTILES
    # Prefixes as load_lora tells the tensors of two experts apart.
    return [
        Learner(
            denoiser=Denoiser(experts[0]), tuned=tuned[0], low=limit, share=share, learning_rate=rate,
            role="high", prefix="pipe.dit.",
        ),
        Learner(
            denoiser=Denoiser(experts[1]), tuned=tuned[1], high=limit, share=1 - share,
            learning_rate=config.experts.low_learning_rate or rate, role="low", prefix="pipe.dit2.",
        ),
    ]  # fmt: skip


def _role_alone(parts: PipelineComponents, config: TrainConfig) -> Role | None:
    """Which expert a DiT that trains alone is; None: it trains at all timesteps."""
    told, boundary = config.experts.role, config.experts.boundary
    role = parts.role if told is None else told
    if role is None or role == "all":
        if boundary is not None:
            raise ArgumentError(
                f"experts.boundary is {boundary}, and nothing says which expert model.dit is; set "
                "experts.role to high or low, or leave the boundary out."
            )
        return None
    return role


def _tell_of_role(learner: Learner, config: TrainConfig) -> None:
    if learner.role is None:
        return
    logger.info(
        "model.dit is the %s-noise expert of a pair (%s): it trains at timesteps %g to %g, and its files "
        "will tell it.%s",
        learner.role,
        "experts.role" if config.experts.role else "as it says itself; experts.role: all trains it at all",
        learner.low, learner.high,
        " Sample videos are made with it alone, at every step." if config.samples.prompts else "",
    )  # fmt: skip


def tune_of_low(config: TrainConfig) -> TuneConfig:
    """What trains of the low-noise expert: as of the other, but for its rank, alpha / rank staying."""
    rank = config.experts.low_rank or config.tune.rank
    alpha = None if config.tune.alpha is None else config.tune.alpha * rank / config.tune.rank
    return replace(config.tune, rank=rank, alpha=alpha)


def _start_from(path: Path, tuned: list[Tuned]) -> None:
    loras = open_loras(path)
    if len(loras) not in (1, len(tuned)):
        raise ArgumentError(f"{path} holds {len(loras)} LoRAs and {len(tuned)} DiTs are trained.")
    for number, one in enumerate(tuned):
        one.start_from(loras[number if len(loras) > 1 else 0])


def restore(loaded: Loaded, state: State) -> None:
    """Put the trained tensors of a state back; before anything is sharded."""
    for learner in loaded.learners:
        own = {
            name.removeprefix(learner.prefix): tensor
            for name, tensor in state.tensors.items()
            if name.startswith(learner.prefix)
        }
        learner.tuned.load_state_dict(own)


def data_hash(samples: CachedDataset) -> str:
    """Of the samples that take part, whatever their order."""
    names = sorted(samples.sample_id(index) for index in range(len(samples)))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def run_facts(
    config: TrainConfig, loaded: Loaded, samples: CachedDataset, world: int, num_held_out: int
) -> dict[str, str]:
    """What a checkpoint remembers, to be compared when a run goes on from it."""
    run = config.run
    told = {
        "model": loaded.identity,
        "model files": model_files(config),
        "method": method_of(config),
        "optimizer": config.optimizer.name,
        "optimizer settings": json.dumps(
            {"learning_rate": config.optimizer.learning_rate, **config.optimizer.options}, default=str
        ),
        "learning rate": json.dumps({name: getattr(config.optimizer, name) for name in _OF_THE_RATE}),
        "objective": json.dumps(asdict(config.objective)),
        "held out": str(num_held_out),
        "data": data_hash(samples),
        "seed": str(run.seed),
        "samples of a step": str(run.batch_size * run.accumulate * world),
    }
    if sizes := [one.own_batch_size * run.accumulate * world for one in config.data if one.own_batch_size]:
        told["samples of a step"] += f", of some datasets {', '.join(map(str, sizes))}"
    if config.experts != ExpertsConfig():
        told["experts"] = json.dumps(asdict(config.experts))
    if len(loaded.learners) == 1 and (role := loaded.learners[0].role) is not None:
        told["the expert that trains alone"] = role
    return told


def model_files(config: TrainConfig) -> str:
    """Names of the files of what trains."""
    return " ".join(Path(path).name for path in (*config.model.dit, *config.model.dit_low))


def method_of(config: TrainConfig) -> str:
    """What trains, in one line."""
    tune_config = config.tune
    method = f"{tune_config.kind} of {', '.join(tune_config.networks)}"
    if tune_config.kind in WITH_FACTORS:
        method += (
            f", rank {tune_config.rank}, alpha {alpha_of(tune_config):g}, targets "
            f"{' '.join(tune_config.targets)}"
        )
        if config.experts.low_rank is not None:
            method += f", rank {config.experts.low_rank} in the low-noise expert"
    elif tune_config.parts:
        method = f"parts {' '.join(tune_config.parts)}"
    return method


def alpha_of(config: TuneConfig) -> float:
    """Of the factors."""
    return float(config.rank if config.alpha is None else config.alpha)


def file_metadata(
    config: TrainConfig, loaded: Loaded, facts: Mapping[str, str], step: int, learner: Learner
) -> dict[str, str]:
    """What exports and checkpoints say about themselves, in the words of this package and of others."""
    files = config.model.dit_low if learner.role == "low" and config.model.dit_low else config.model.dit
    base = " ".join(Path(path).name for path in files)
    is_lora = config.tune.kind in WITH_FACTORS
    told = {
        "base_model": base, "base_model_identity": loaded.identity, "trigger": config.run.trigger,
        "steps": str(step), "data_hash": facts["data"], "seed": str(config.run.seed),
        "method": facts["method"],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"wan-video/{'lora' if is_lora else 'model'}",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": Path(config.run.output).resolve().name,
        "modelspec.trigger_phrase": config.run.trigger,
        "ss_sd_model_name": base, "ss_output_name": Path(config.run.output).resolve().name,
        "ss_steps": str(step), "ss_learning_rate": str(learner.learning_rate),
        "ss_optimizer": config.optimizer.name, "ss_seed": str(config.run.seed),
        "ss_batch_size_per_device": str(config.run.batch_size),
        "ss_gradient_accumulation_steps": str(config.run.accumulate),
    }  # fmt: skip
    if learner.role is not None:
        told["expert"] = learner.role
    if is_lora:
        rank, alpha = str(learner.tuned.config.rank), f"{alpha_of(learner.tuned.config):g}"
        return {
            **told, "rank": rank, "alpha": alpha, "ss_network_dim": rank, "ss_network_alpha": alpha,
            "ss_network_module": "networks.lora_wan",
        }  # fmt: skip
    # A whole model keeps what no shape tells: sizes, defaults of generation.
    return {**loaded.metadata, **told}


def checkpoint_metadata(config: TrainConfig, told: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """`file_metadata`, and alpha where readers of LoRA files look for it: by the first part of the names."""
    if config.tune.kind not in WITH_FACTORS:
        return dict(told)
    tops = sorted({name.partition(".")[0] for name in names})
    alphas: dict[str, object] = {f"{top}.lora_alpha": alpha_of(config.tune) for top in tops}
    if config.experts.low_rank is not None:
        alphas["pipe.alpha_pattern"] = {r"pipe\.dit2\..*": alpha_of(tune_of_low(config))}
    return {**told, "lora_adapter_metadata": json.dumps(alphas)}

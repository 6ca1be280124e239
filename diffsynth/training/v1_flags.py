"""The flags of DiffSynth v1's ``train_wan_t2v.py``, as one table from flags to settings.

Names, defaults and meanings are v1's: the first ``num_frames`` frames at the file's own rate, one size, no
caption dropout, no clipping, a constant learning rate, a checkpoint per epoch and all of them kept. An epoch
is ``steps_per_epoch`` samples, shared by the GPUs. What v1 passed over in silence is told in the log.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffsynth.errors import (
    ArgumentError,
    DiffSynthError,
    MediaNotFoundError,
    MissingPackageError,
    OutputPathError,
    UnknownArgumentError,
    install_extra,
)

if TYPE_CHECKING:
    from diffsynth.training.config import TrainConfig
    from diffsynth.training.run import RunReport

logger = logging.getLogger("diffsynth")

DATA_PROCESS, TRAIN = "data_process", "train"
BOTH = (DATA_PROCESS, TRAIN)
DEEPSPEED = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
SETTINGS_FILE = "config.yaml"
ENCODED_WITH = ".diffsynth-encoded.yaml"  # in the dataset: the settings of its last data_process
ENCODERS = ("text_encoder", "vae", "image_encoder")


def _strategy(value: Any) -> str:
    if value != DEEPSPEED[-1]:
        return str(value)
    logger.warning(
        "--training_strategy %s runs as fsdp2, which as well shards the model, its gradients and the state "
        "of the optimizer over the GPUs.", value,
    )  # fmt: skip
    return "fsdp2"


def _paths(text: str) -> list[str]:
    return [path.strip() for path in text.split(",") if path.strip()]


def _same(value: Any) -> object:
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag of v1, and the setting that it fills."""

    name: str
    key: str  # dotted; "" where `config_of` reads it
    help: str
    default: Any = None  # None: the setting's own
    kind: Callable[[str], Any] | None = str  # None: a switch
    choices: tuple[str, ...] = ()
    tasks: tuple[str, ...] = BOTH  # that read it
    is_path: bool = False  # of files that must be there; commas part the shards of one model
    is_of_lora: bool = False  # read by --train_architecture lora alone
    reads: Callable[[Any], object] = _same  # from what was typed to the setting


def _encode(**facts: Any) -> Flag:
    return Flag(tasks=(DATA_PROCESS,), **facts)


def _train(**facts: Any) -> Flag:
    return Flag(tasks=(TRAIN,), **facts)


FLAGS = (
    Flag(name="task", key="run.task", choices=BOTH, help="Encode the clips, or train on what was encoded."),
    Flag(name="dataset_path", key="data.path", is_path=True, help="Folder with metadata.csv and train/."),
    Flag(name="output_path", key="run.output", default="./", help="Folder of logs and checkpoints."),
    _encode(name="text_encoder_path", key="model.text_encoder", is_path=True, help="File of the T5."),
    _encode(name="image_encoder_path", key="model.image_encoder", is_path=True,
            help="File of CLIP: encodes for image-to-video, each clip's first frame as its picture."),
    _encode(name="vae_path", key="model.vae", is_path=True, help="File of the VAE."),
    Flag(name="dit_path", key="model.dit", is_path=True, reads=_paths,
         help="File of the DiT, shards parted by commas; data_process looks into its header, if given."),
    _encode(name="tiled", key="cache.tiled", kind=None, help="Code the VAE in tiles."),
    _encode(name="tile_size_height", key="cache.tile_size.0", default=34, kind=int, help="Of a tile."),
    _encode(name="tile_size_width", key="cache.tile_size.1", default=34, kind=int, help="Of a tile."),
    _encode(name="tile_stride_height", key="cache.tile_stride.0", default=18, kind=int,
            help="From tile to tile."),
    _encode(name="tile_stride_width", key="cache.tile_stride.1", default=16, kind=int,
            help="From tile to tile."),
    _train(name="steps_per_epoch", key="", default=500, kind=int, help="Samples that make an epoch."),
    Flag(name="num_frames", key="data.num_frames", default=81, kind=int,
         help="4 k + 1; the first ones. Of train: as they were encoded."),
    Flag(name="height", key="data.height", default=480, kind=int, help="Pixels; cut in the middle."),
    Flag(name="width", key="data.width", default=832, kind=int, help="Pixels."),
    Flag(name="dataloader_num_workers", key="run.workers", default=1, kind=int,
         help="Processes that read samples; of data_process: threads that decode (4 if not given)."),
    _train(name="learning_rate", key="optimizer.learning_rate", default=1e-5, kind=float,
           help="Of AdamW; constant."),
    _train(name="accumulate_grad_batches", key="run.accumulate", default=1, kind=int,
           help="Samples of a step, on each GPU."),
    _train(name="max_epochs", key="", default=1, kind=int, help="Epochs; each ends with a checkpoint."),
    _train(name="lora_target_modules", key="tune.targets", default="q,k,v,o,ffn.0,ffn.2", reads=_paths,
           is_of_lora=True, help="Layers that get factors."),
    _train(name="init_lora_weights", key="tune.init", default="kaiming", choices=("gaussian", "kaiming"),
           is_of_lora=True, help="How the first factor begins."),
    _train(name="training_strategy", key="run.strategy", default="auto",
           choices=("auto", "ddp", "fsdp2", *DEEPSPEED), reads=_strategy,
           help="auto: one GPU, or each with its own copy. fsdp2 shards the model over them, "
           "deepspeed_stage_1 and 2 what the optimizer keeps (needs deepspeed)."),
    _train(name="lora_rank", key="tune.rank", default=4, kind=int, is_of_lora=True, help="Of the factors."),
    _train(name="lora_alpha", key="tune.alpha", default=4.0, kind=float, is_of_lora=True,
           help="Factors count alpha / rank."),
    _train(name="use_gradient_checkpointing", key="memory.gradient_checkpointing", kind=None,
           reads=lambda _: "full", help="Compute blocks again instead of keeping them."),
    _train(name="use_gradient_checkpointing_offload", key="memory.offload", kind=None,
           help="Also keep what is left on the host; turns checkpointing on."),
    _train(name="train_architecture", key="tune.kind", default="lora", choices=("lora", "full"),
           help="What trains."),
    _train(name="pretrained_lora_path", key="run.start_from", is_path=True, is_of_lora=True,
           help="A LoRA to begin with; its weights alone."),
    _train(name="use_swanlab", key="run.loggers", kind=None, reads=lambda _: ["swanlab"],
           help="Log to SwanLab too."),
    _train(name="swanlab_mode", key="", help="Of SwanLab: cloud, local, offline, disabled."),
)  # fmt: skip
BY_NAME = {flag.name: flag for flag in FLAGS}
# what v1 did and had no flag for
FIXED = {"optimizer.name": "adamw", "optimizer.clip_norm": 0.0, "run.keep_last": 0}
NEEDED = {
    DATA_PROCESS: ("dataset_path", "text_encoder_path", "vae_path"),
    TRAIN: ("dataset_path", "dit_path"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message}. All flags: --help.")


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The flags that were typed, by name.

    Raises:
        UnknownArgumentError: for a flag that v1 does not have, with the nearest.
        ArgumentError: for a value of another kind.
    """
    parser = _Parser(
        prog="train_wan_t2v.py",
        description="Train Wan with the flags of DiffSynth-Studio v1. `diffsynth train` can do more.",
    )
    for flag in FLAGS:
        text = flag.help if flag.default is None else f"{flag.help} [{flag.default}]"
        if flag.kind is None:
            parser.add_argument(f"--{flag.name}", action="store_true", default=None, help=text)
        else:
            parser.add_argument(f"--{flag.name}", type=flag.kind, choices=flag.choices or None, help=text)
    found, strange = parser.parse_known_args(arguments)
    for word in strange:
        if word.startswith("--"):
            raise UnknownArgumentError(word[2:].partition("=")[0], BY_NAME, "train_wan_t2v.py")
        raise ArgumentError(f"{word!r} follows no flag; flags are --name value, such as --height 480.")
    return {name: value for name, value in vars(found).items() if value is not None}


def config_of(given: Mapping[str, Any]) -> TrainConfig:
    """The settings that v1's flags mean; see `parsed`.

    Raises:
        ArgumentError: for a missing flag, a value that cannot work, or that do not go together.
        MediaNotFoundError: for a path that is not there.
        MissingPackageError: when SwanLab is asked for and not installed.
    """
    from diffsynth.training.config import TrainConfig
    from diffsynth.training.config_files import build
    from diffsynth.training.dataset.config import v1_dataset

    task = _checked(given)
    values = {f.name: f.default for f in FLAGS if f.default is not None}
    content, size = _as_encoded(given) if task == TRAIN else ({}, {})
    values |= {**given, **size}
    for flag in FLAGS:
        if flag.key and flag.name in values and _is_read(flag, task, given):
            _put(content, flag.key, flag.reads(values[flag.name]))
    for key, value in FIXED.items():
        _put(content, key, value)
    if content.get("memory", {}).get("offload"):
        content["memory"]["gradient_checkpointing"] = "full"
    if task == DATA_PROCESS and "dataloader_num_workers" in given:
        _put(content, "cache.workers", max(1, given["dataloader_num_workers"]))
    data = content.pop("data")
    config: TrainConfig = build(TrainConfig, {**_with_lists(content), "data": (v1_dataset(**data),)}, "")
    return config if task == DATA_PROCESS else _with_epochs(config, values)


def run(arguments: Sequence[str]) -> RunReport | None:
    """Do what v1's script did with these arguments.

    Raises:
        DiffSynthError: see `config_of` and `training.run.train`.
    """
    given = parsed(arguments)
    try:
        config = config_of(given)
        from diffsynth.training.run import train
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "yaml"):
            raise
        raise MissingPackageError(str(error.name), "training", install_extra("train")) from error
    if "swanlab_mode" in given:
        os.environ["SWANLAB_MODE"] = given["swanlab_mode"]
    if config.run.task == DATA_PROCESS:
        _keep_settings(config)
        train(config)
        return None
    return train(config)


def _checked(given: Mapping[str, Any]) -> str:
    """Tell what does not fit; returns the task."""
    if "task" not in given:
        raise ArgumentError("--task is missing; give --task data_process, and then --task train.")
    task = str(given["task"])
    for name in NEEDED[task]:
        if name not in given:
            raise ArgumentError(f"--task {task} needs --{name}: {BY_NAME[name].help}")
    for flag in FLAGS:
        if flag.name in given and not _is_read(flag, task, given):
            why = "--train_architecture full does not read it" if flag.is_of_lora else "--tiled is not given"
            why = why if task in flag.tasks else f"--task {task} does not read it"
            logger.warning("--%s is not used: %s.", flag.name, why)
        elif flag.name in given and flag.is_path:
            _require_paths(flag.name, str(given[flag.name]))
    if "swanlab_mode" in given and "use_swanlab" not in given and task == TRAIN:
        raise ArgumentError(
            "--swanlab_mode is given without --use_swanlab, which reads it; give both or none."
        )
    if "use_swanlab" in given and task == TRAIN and find_spec("swanlab") is None:
        raise MissingPackageError("swanlab", "--use_swanlab", "pip install swanlab")
    return task


def _is_read(flag: Flag, task: str, given: Mapping[str, Any]) -> bool:
    if flag.name.startswith("tile_") and "tiled" not in given:
        return False
    if flag.is_of_lora and given.get("train_architecture") == "full":
        return False
    return task in flag.tasks


def _require_paths(name: str, value: str) -> None:
    paths = _paths(value)
    if not paths:
        raise ArgumentError(f"--{name} is empty; give a path.")
    missing = [path for path in paths if not Path(path).expanduser().exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise MediaNotFoundError(f"--{name}: {missing[0]}{more} does not exist (looked in {os.getcwd()}).")


def _as_encoded(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings that say whose samples are meant, and frames and size where they are not given.

    Those of the last data_process, which lie in the dataset; else what the newest cached clip tells.
    """
    root = Path(given["dataset_path"]).expanduser()
    record = (root if root.is_dir() else root.parent) / ENCODED_WITH
    content, size, source = _of_record(record) or _of_newest(root)
    size = {name: value for name, value in size.items() if name not in given}
    if any(BY_NAME[name].default != value for name, value in size.items()):
        told = ", ".join(f"--{name} {value}" for name, value in size.items())
        logger.info("As in %s, which was encoded last: %s.", source, told)
    return content, size


def _of_record(record: Path) -> tuple[dict[str, Any], dict[str, int], str] | None:
    from diffsynth.training.config import TrainConfig
    from diffsynth.training.config_files import load_config

    if not record.is_file():
        return None
    try:
        config: TrainConfig = load_config(TrainConfig, record)
    except DiffSynthError as error:
        logger.warning("What was encoded last is told by the newest sample: %s", error)
        return None
    height, width = config.data[0].sizes[0]
    model = {name: value for name in ENCODERS if (value := getattr(config.model, name)) is not None}
    size = {"num_frames": config.data[0].num_frames[0], "height": height, "width": width}
    return {"model": model, "cache": asdict(config.cache)}, size, record.name


def _of_newest(root: Path) -> tuple[dict[str, Any], dict[str, int], str]:
    for path in _cached_clips(root):
        cache, size = _told_by(path)
        return {"cache": cache}, size, path.name
    return {}, {}, ""


def _cached_clips(place: Path) -> Iterator[Path]:
    """Files of the cache, the newest first, videos before pictures."""
    from diffsynth.training.cache_keys import SUFFIX
    from diffsynth.training.v1_cache import V1_SUFFIX
    from diffsynth.video.paths import IMAGE_SUFFIXES

    root = place if place.is_dir() else place.parent
    folders = [folder for folder in (root / "train", root) if folder.is_dir()]
    for suffix in (SUFFIX, V1_SUFFIX):
        files = [file for folder in folders for file in folder.glob(f"*{suffix}") if file.name[0] != "."]
        pictures = {file for file in files if any(f"{end}." in file.name.lower() for end in IMAGE_SUFFIXES)}
        yield from sorted(files, key=lambda file: (file in pictures, -file.stat().st_mtime_ns))


def _told_by(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings of the cache, and frames and size, by one cached clip."""
    import json

    from diffsynth.training.cached_dataset import is_v1
    from diffsynth.training.samples import EncodedSample
    from diffsynth.training.v1_cache import header_v1

    cache: dict[str, Any] = {}
    if is_v1(path):
        _, _, frames, rows, columns = header_v1(path).latent_shape
        size = {"height": 8 * rows, "width": 8 * columns}
    else:
        header = EncodedSample.header(path)
        frames, told = header.latent_shape[2], json.loads(header.meta["transform"])
        size = {"height": int(told["height"]), "width": int(told["width"])}
        cache["dtype"] = header.meta["dtype"]
        if header.meta["tiles"]:
            cache["tiled"], tiles = True, json.loads(header.meta["tiles"])
            cache["tile_size"], cache["tile_stride"] = tiles
    # A picture says nothing of how long videos are.
    return cache, (size if frames == 1 else {"num_frames": 4 * (frames - 1) + 1, **size})


def _with_epochs(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Steps as Lightning counted them for v1: an epoch's samples are shared by the GPUs."""
    from diffsynth.training.loading import resolved_device
    from diffsynth.training.processes import Ranks

    for name in ("steps_per_epoch", "max_epochs"):
        if values[name] < 1:
            raise ArgumentError(f"--{name} is {values[name]}; give 1 or more.")
    world = Ranks.of(config, resolved_device(config.model.device)).world
    steps = ceil(ceil(values["steps_per_epoch"] / world) / config.run.accumulate)
    return replace(
        config,
        run=replace(
            config.run, steps=steps * values["max_epochs"], save_every=steps, steps_per_epoch=steps
        ),
    )  # fmt: skip


def _keep_settings(config: TrainConfig) -> None:
    """Lay the settings into a version folder of their own, as v1 counted them: training's is the next."""
    from diffsynth.training.checkpoints import LOGS, version_folder
    from diffsynth.training.config_files import save_config
    from diffsynth.video.paths import disk_errors

    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK")):
        return
    output = Path(config.run.output)
    folder = version_folder(output, None)
    last = output / LOGS / f"version_{int(folder.name.partition('_')[2]) - 1}"
    if last.is_dir() and [entry.name for entry in last.iterdir()] == [SETTINGS_FILE]:
        folder = last  # of a data_process that ran before this one, and nothing in between
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / SETTINGS_FILE)
    root = Path(config.data[0].path).expanduser()
    whole: dict[str, Any] = {
        n: str(Path(p).expanduser().absolute()) for n in ENCODERS if (p := getattr(config.model, n))
    }
    try:
        save_config(
            replace(config, model=replace(config.model, **whole)),
            (root if root.is_dir() else root.parent) / ENCODED_WITH,
        )
    except OutputPathError as error:
        logger.info("What is encoded is not noted beside it: %s", error)


def _put(content: dict[str, Any], key: str, value: object) -> None:
    *way, last = key.split(".")
    for part in way:
        content = content.setdefault(part, {})
    content[last] = value


def _with_lists(value: Any) -> Any:
    """Dicts whose keys are numbers become lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(one) for key, one in value.items()}
    if inner and all(key.isdigit() for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner

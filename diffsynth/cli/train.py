"""``diffsynth train``: a YAML file, flags laid over it, and a run. Its help is made of the settings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from diffsynth.cli.output import log_to_stderr
from diffsynth.errors import MissingPackageError, install_extra

if TYPE_CHECKING:
    from diffsynth.training.config import TrainConfig
    from diffsynth.training.run import RunReport

ENCODED_WITH = "data_process.yaml"  # in the output folder: the settings of the last encoding

USAGE = """Usage: diffsynth train [CONFIG.yaml] [--key.sub VALUE ...] [--quiet] [--debug]

Train a LoRA, or everything, on your videos and pictures: clips are encoded once (run.task data_process),
then trained on (train), or both in one go. What a flag names replaces what the file says. The last part
of a key is enough where only one section has it: --steps 500. data.0 is the first dataset.

For example: diffsynth train train/recipes/tiny_lora.yaml --steps 500 --resume latest
"""


def run_train(arguments: Sequence[str]) -> None:
    """Run what the command line says.

    Args:
        arguments: behind ``train``, as typed.

    Raises:
        MissingPackageError: without Lightning.
        DiffSynthError: see `training.run.train`.
    """
    given = [one for one in arguments if one not in ("--quiet", "-q")]
    if not given or "--help" in given or "-h" in given:
        typer.echo(_help())
        return
    path = None if given[0].startswith("--") else given[0]
    flags = given if path is None else given[1:]
    with log_to_stderr(len(given) < len(arguments)):
        config = _config(path, flags)
        report = _train(config)
        if config.run.task != "data_process":
            typer.echo(str(report))
            if report.exit_code:
                raise typer.Exit(report.exit_code)
        elif os.environ.get("RANK", "0") == "0":
            saved = _save_settings(config)
            typer.echo(f"Encoded; --run.task train goes on from here. The settings are in {saved}.")


def _help() -> str:
    with _needing_lightning():
        from diffsynth.training.config import TrainConfig
        from diffsynth.training.config_table import help_text

    return f"{USAGE}\nKeys [default]:\n{help_text(TrainConfig)}"


def _config(path: str | None, flags: Sequence[str]) -> TrainConfig:
    with _needing_lightning():
        from diffsynth.training.config import TrainConfig
        from diffsynth.training.config_files import load_config

    return load_config(TrainConfig, path, flags)


def _train(config: TrainConfig) -> RunReport:
    with _needing_lightning():
        from diffsynth.training.run import train

    return train(config)


def _save_settings(config: TrainConfig) -> Path:
    """Save the settings of an encoding alone; a training saves its own in the folder of its logs."""
    from diffsynth.training.config_files import save_config

    path = Path(config.run.output) / ENCODED_WITH
    save_config(config, path)
    return path


@contextmanager
def _needing_lightning() -> Iterator[None]:
    """Tell a missing package of the extra "train" in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "yaml"):
            raise
        raise MissingPackageError(str(error.name), "diffsynth train", install_extra("train")) from error

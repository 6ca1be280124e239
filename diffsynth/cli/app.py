"""The command ``diffsynth``: every subcommand, and how errors are told. Nothing here imports torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from diffsynth import __version__
from diffsynth.cli.flags import FLAGS, with_flags
from diffsynth.errors import DiffSynthError

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended

app = typer.Typer(
    name="diffsynth",
    help="Videos from words with the Wan models, and tools for their checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line of this process, and end the process."""
    app(prog_name="diffsynth")


@contextmanager
def plain_errors(debug: bool = False) -> Iterator[None]:
    """Tell our own errors in one message on stderr and end with status 1; others keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Stopped. Nothing half-written was left behind.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except DiffSynthError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"diffsynth {__version__} (Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    epilog="For example: diffsynth generate 'a cat on the beach' --model Wan2.1-T2V-1.3B --out cat.mp4"
)
@with_flags(FLAGS)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.", show_default=False)], **given: object
) -> None:
    """Make a video, or a picture, from words. What is not given is as the model's makers recommend."""
    from diffsynth.cli.generate import run_generate

    with plain_errors(bool(given.pop("debug"))):
        run_generate(prompt, given)


@app.command()
def inspect(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per network.")] = False,
) -> None:
    """Say what checkpoints hold, by their headers alone: fast, and nothing is loaded."""
    from diffsynth.cli.inspect import run_inspect

    with plain_errors():
        run_inspect(paths, as_json)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what this machine has, what is missing, and how to mend it."""
    from diffsynth.cli.doctor import run_doctor

    with plain_errors():
        run_doctor(as_json)

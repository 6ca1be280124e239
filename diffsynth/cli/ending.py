"""How the command ends: in one message for what a user can mend, and with a status that tells.

Status 0 is success, 1 an error, or output that could not be written whole (``| head -1``), 2 a line
that cannot be parsed, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

import typer

from diffsynth.errors import DiffSynthError

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended
_PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "cv2": "opencv-python"}  # whose names are not their modules'


@contextmanager
def plain_errors(debug: bool = False) -> Iterator[None]:
    """Tell an error in one message on stderr, with status 1; what nobody foresaw keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"Stopped. {str(error) or 'Nothing half-written was left behind.'}", err=True)
        raise typer.Exit(getattr(error, "exit_code", INTERRUPTED)) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except (DiffSynthError, OSError, MemoryError) as error:
        if debug:
            raise
        typer.echo(f"error: {_told(error)}", err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        if missing := missing_package(error):
            if debug:
                raise
            typer.echo(f"error: {missing}", err=True)
            raise typer.Exit(1) from None
        traceback.print_exc()
        typer.echo(
            "error: This is a fault of diffsynth, not of your line. The lines above say where it is: please "
            "report them with the command.",
            err=True,
        )
        raise typer.Exit(1) from None


def missing_package(error: Exception) -> str | None:
    """What to install where a package of others is not there, or None: it is another error."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if module in ("", "diffsynth"):
        return None
    package = _PACKAGES.get(module, module)
    return f"The Python package {module} is not installed, and this needs it: pip install {package}"


def _told(error: Exception) -> str:
    if isinstance(error, DiffSynthError):
        return str(error)
    if isinstance(error, MemoryError):
        return "The memory of this machine does not suffice. Ask for less, or close other programs."
    assert isinstance(error, OSError)
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason}. Check the path, and who may read and write there."
    return f"The system refused: {reason}."


@contextmanager
def whole_output() -> Iterator[None]:
    """Let no stream that fails (full disk, reader that left, ``>&-``) end the work; it is told at the end.

    Raises:
        SystemExit: as the command raised it; with status 1 where stdout could not be written whole.
    """
    _open_closed_streams()
    streams = sys.stdout, sys.stderr
    out, err = _Steadfast(sys.stdout), _Steadfast(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = streams
        if out.failure is not None:
            if not isinstance(out.failure, BrokenPipeError):
                reason = out.failure.strerror or str(out.failure)
                typer.echo(f"error: The output of this command cannot be written: {reason}.", err=True)
            raise SystemExit(1)


class _Steadfast:
    """A stream that goes on when it cannot be written: the video is worth more than the line about it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None  # the first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self._try(self._stream.writelines, lines)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., object], *arguments: object) -> None:
        if self.failure is None:
            try:
                act(*arguments)
            except OSError as error:
                self.failure = error
                with suppress(OSError, ValueError):  # what it still holds is not tried again at the end
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _open_closed_streams() -> None:
    """Give closed streams a place, so that no file gets their numbers; no text breaks a stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure") and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a name of a file need not be in its encoding

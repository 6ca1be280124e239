"""Wishes that come as signals while a run is at work: to save, to stop.

The first Ctrl-C, or a SIGTERM, is obeyed when what is at work is done: a step, a clip. The second Ctrl-C
stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from diffsynth.portable import SAVE_SIGNAL

CTRL_C = "Ctrl-C"
EXIT_OF_CTRL_C = 128 + signal.SIGINT  # what shells expect of a program that Ctrl-C ended
ECHO_S = 1.0  # torchrun passes a Ctrl-C on that the terminal has sent to all processes already


class Stopped(KeyboardInterrupt):
    """A run ended before its end because a user wished it; its text says what is kept."""

    def __init__(self, kept: str, name: str = CTRL_C) -> None:
        super().__init__(kept)
        self.exit_code = EXIT_OF_CTRL_C if name == CTRL_C else 128 + signal.Signals[name]


class Wishes:
    """Signals of the time inside, as wishes. In a thread no signals arrive, and nothing is changed.

    Args:
        told: is said at the first Ctrl-C; "" by ranks that leave that to the first.
        is_worth_waiting: whether there is anything to save; else the first Ctrl-C stops at once.
    """

    def __init__(self, told: str, is_worth_waiting: Callable[[], bool] = lambda: True) -> None:
        self._told, self._is_worth_waiting = told, is_worth_waiting
        self._before: dict[int, signal._HANDLER] = {}
        self._first_s = 0.0
        self.saves = False
        self.stopped_by: str | None = None  # Ctrl-C, or the name of the signal
        self.is_at_once = False  # a KeyboardInterrupt is on its way

    def __enter__(self) -> Wishes:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM, *([SAVE_SIGNAL] if SAVE_SIGNAL else [])]
            self._before = {number: signal.getsignal(number) for number in numbers}
            self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def listen(self) -> None:
        """Take the signals back from a library that has put handlers of its own there meanwhile."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self.saves = True
        elif number != signal.SIGINT:
            self.stopped_by = self.stopped_by or signal.Signals(number).name
        elif self.stopped_by is None and self._is_worth_waiting():
            self.stopped_by, self._first_s = CTRL_C, time.monotonic()
            with suppress(OSError):  # not by the log: this may have come in the middle of a line of it
                os.write(2, f"\n{self._told}\n".encode() if self._told else b"")
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._first_s > ECHO_S:
            self.is_at_once = True
            raise KeyboardInterrupt


def leave_signals_to_the_parent(_: int = 0) -> None:
    """For a process that reads samples: the terminal signals it too, and it ends when its parent does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

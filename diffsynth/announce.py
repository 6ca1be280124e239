"""Lines that a user must see even in a script that sets up no logging: what a load found and what fitted.

They go to the logger "diffsynth" like any other. Where nobody listens to it, Python would drop them (without
a handler only warnings are shown), so they are written to stderr instead, unless ``DIFFSYNTH_QUIET=1``.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("diffsynth")

QUIET = "DIFFSYNTH_QUIET"  # environment variable; "", "0" and an absent one mean: not quiet


def announce(message: str, *values: object) -> None:
    """Log a line at INFO; without any handler write it to stderr.

    A program that has set up logging, before or after the import, decides alone what is shown: it gets no
    line twice. The same holds for one that has set a level for this logger, or has switched logging off.

    Args:
        message: with %-places for ``values``, as in `logging.Logger.info`.
        values: fill the places.
    """
    logger.info(message, *values)
    is_silenced = logger.disabled or logger.level > logging.INFO or logger.manager.disable >= logging.INFO
    is_quiet = is_silenced or os.environ.get(QUIET, "0") not in ("", "0")
    has_console = sys.stderr is not None  # a program of windows alone has none
    if has_console and not is_quiet and not logger.hasHandlers():
        sys.stderr.write(f"{message % values}\n")

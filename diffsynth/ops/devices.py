"""Devices as users name them: one that is not here is an error before anything moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffsynth.errors import ArgumentError

HERE_ANYWAY = ("cpu", "meta")


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """What is queued inside goes to this stream, of whichever GPU.

    Without its GPU as the current one, torch would open a context on the first GPU when it leaves.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def known_device(device: torch.device | str | int, name: str = "device") -> torch.device:
    """Return a device of this machine.

    Args:
        device: "cpu", "cuda", "cuda:1" ...
        name: of the argument, for the message.

    Raises:
        ArgumentError: for what names no device, or one that this machine lacks.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ArgumentError(
            f"{name} is {device!r}, which names no device; give cpu, cuda or cuda:1."
        ) from None
    if chosen.type in HERE_ANYWAY:
        return chosen
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and not count:
        raise ArgumentError(f"{name} is {str(chosen)!r}, but torch finds no GPU; give cpu, or leave it out.")
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        last = f" to cuda:{count - 1}" if count > 1 else ""
        raise ArgumentError(
            f"{name} is {str(chosen)!r}, and this machine has cuda:0{last}; give one of these."
        )
    if chosen.type != "cuda":
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or accelerator.type != chosen.type:
            raise ArgumentError(
                f"{name} is {str(chosen)!r}, but torch finds none here; give cpu, or leave it out."
            )
    return chosen

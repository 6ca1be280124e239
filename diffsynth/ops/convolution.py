"""Where torch computes the convolutions of videos without cuDNN: slowly, and in many times the memory.

cuDNN 9.8 to 9.14 computes some convolutions over three axes in bfloat16 and float16 wrongly, so that torch
from 2.9.1 on leaves such versions out; torch 2.9.0 leaves out every cuDNN from 9.8 on. What takes their place
unfolds all windows of a video in memory first: one decoder took 17 times as much.

Source: torch ``aten/src/ATen/native/Convolution.cpp`` use_cudnn; pytorch issues 163539 and 166643.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

import torch
from torch import nn

FIRST_WRONG, FIRST_RIGHT = 90800, 91500  # of cuDNN, as torch numbers it
HALF = (torch.bfloat16, torch.float16)

logger = logging.getLogger("diffsynth")


def cudnn_version() -> int | None:
    """The cuDNN that torch has loaded, 91900 for 9.19.0; None where there is none, as on GPUs of AMD."""
    if torch.version.cuda is None:
        return None
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def cudnn_text(version: int) -> str:
    """As people write it: 9.10.2 for 91002."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def slow_convolutions() -> str | None:
    """What is slow about convolutions of videos here and what to do about it, or None where all is well."""
    cudnn = cudnn_version()
    release = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:3])
    if cudnn is None or release < (2, 9) or cudnn < FIRST_WRONG:
        return None
    if cudnn >= FIRST_RIGHT and release != (2, 9, 0):
        return None
    wheel = f"nvidia-cudnn-cu{(torch.version.cuda or '12').partition('.')[0]}"
    return (
        f"torch {torch.__version__} with cuDNN {cudnn_text(cudnn)} computes the VAE's convolutions in "
        "half precision without cuDNN, which may take many times the memory and time. Install torch 2.11 "
        f"or newer, or torch 2.9.1 or 2.10 and then a newer cuDNN: pip install '{wheel}>=9.15'."
    )


def warn_of_slow_convolutions(network: object, device: torch.device) -> None:
    """Tell it in the log once, where a network of half precision is about to compute on a GPU."""
    if device.type != "cuda" or not isinstance(network, nn.Module):
        return
    if any(weight.dtype in HALF for weight in network.parameters()) and (fault := slow_convolutions()):
        _warn(fault)


@lru_cache
def _warn(message: str) -> None:
    logger.warning("%s", message)

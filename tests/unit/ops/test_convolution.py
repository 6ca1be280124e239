"""Versions of torch and cuDNN with which the VAE takes many times its memory are told."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from diffsynth.ops import convolution
from diffsynth.ops.convolution import slow_convolutions, warn_of_slow_convolutions

CUDA = torch.device("cuda")


def installed(
    monkeypatch: pytest.MonkeyPatch, release: str, cudnn: int | None, cuda: str | None = "12.8"
) -> None:
    monkeypatch.setattr(torch, "__version__", release)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    convolution._warn.cache_clear()


@pytest.mark.parametrize(
    ("release", "cudnn", "is_slow"),
    [
        ("2.8.0+cu128", 91002, False),
        ("2.9.0+cu128", 91002, True),
        ("2.9.0", 91900, True),  # leaves out every newer one
        ("2.9.0+cu126", 90701, False),
        ("2.9.1+cu128", 91002, True),
        ("2.9.1+cu130", 91300, True),
        ("2.9.1+cu130", 91500, False),
        ("2.10.0+cu128", 91002, True),
        ("2.10.0+cu130", 91501, False),
        ("2.10.0a0+git0123abc", 91400, True),
        ("2.11.0+cu130", 91900, False),
        ("2.14.1+cu130", None, False),
    ],
)
def test_convolutions_without_cudnn_are_known(
    monkeypatch: pytest.MonkeyPatch, release: str, cudnn: int | None, is_slow: bool
) -> None:
    installed(monkeypatch, release, cudnn)
    assert (slow_convolutions() is not None) == is_slow


def test_what_to_install_names_the_wheel_of_this_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "2.9.1+cu130", 91300, "13.0")
    fault = slow_convolutions()
    assert fault is not None and "cuDNN 9.13.0" in fault and "'nvidia-cudnn-cu13>=9.15'" in fault
    installed(monkeypatch, "2.9.1+rocm6.4", 91300, None)  # MIOpen answers under the same name
    assert slow_convolutions() is None


def test_the_warning_comes_once_and_for_half_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch, "2.9.1+cu128", 91002)
    half, single = nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, logger="diffsynth"):
        warn_of_slow_convolutions(half, torch.device("cpu"))
        warn_of_slow_convolutions(single, CUDA)
        assert not caplog.records
        for _ in range(3):
            warn_of_slow_convolutions(half, CUDA)
    assert len(caplog.records) == 1 and "cuDNN 9.10.2" in caplog.text

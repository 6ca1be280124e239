"""What every test starts from: known seeds, no network, a GPU left empty."""

from __future__ import annotations

import gc
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# read by the libraries when they are imported, so before any test is collected
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker for each core, not threads for each worker

LOCAL = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def known_seeds() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks the network is a test that fails on a train."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        is_far = isinstance(address, tuple) and not str(address[0]).startswith(LOCAL)
        if is_far:
            raise AssertionError(f"this test asks the network for {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole toy model on disk; only to be read."""
    from tests.toys import write_toy_folder

    return write_toy_folder(tmp_path_factory.mktemp("toy"))


def pytest_configure(config: pytest.Config) -> None:
    """With ``-n``, the tests of a file stay together: they share what its fixtures make."""
    if getattr(config.option, "dist", None) == "load":
        config.option.dist = "loadfile"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where everything is checked, a folder of tests that went missing is no success."""
    config = session.config
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    is_checked = os.environ.get("CI") == "true" and is_whole and "not weights" in config.option.markexpr
    if is_checked and not any(item.get_closest_marker("fake_cuda") for item in session.items):
        raise pytest.UsageError("no test of the GPU paths was collected; see docs/testing.md")

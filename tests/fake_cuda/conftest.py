"""Tests of this folder run on torch's real CUDA build with a simulated CUDA runtime; see docs/testing.md.

The runtime must be there before Python starts, so that such tests run in a process of their own, one for each
kind of GPU that the marker ``fake_cuda(capability=90, devices=1)`` names. Here, outside, their reports are
passed on as they come in. Inside, tests are ordinary tests.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fake_cuda import build

REPORTS = "FAKE_CUDA_REPORTS"  # inside: the file that reports go to
IS_INSIDE = REPORTS in os.environ
FOLDER = Path(__file__).parent
Gpu = tuple[int, int]  # compute capability times ten, number of devices

if IS_INSIDE:
    from tests.fake_cuda import answers  # noqa: F401  # registers what kernels do not compute


def gpu_of(item: pytest.Item) -> Gpu:
    """What the nearest marker says."""
    marker = item.get_closest_marker("fake_cuda")
    told = {} if marker is None else marker.kwargs
    return told.get("capability", 90), told.get("devices", 1)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("fake_cuda") is None and FOLDER in item.path.parents:
        item.add_marker(pytest.mark.fake_cuda)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if FOLDER in item.path.parents]
    own.sort(key=gpu_of)  # each kind of GPU is one process
    places = [index for index, item in enumerate(items) if FOLDER in item.path.parents]
    for index, item in zip(places, own, strict=True):
        items[index] = item


@pytest.fixture(autouse=True)
def plain_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test finds the runtime as a process starts it, and no kernels to compile."""
    from diffsynth.ops import compiled
    from tests.fake_cuda import controls

    controls.reset()
    if torch.cuda.memory_allocated():  # of an earlier test, in a circle that nobody has collected yet
        gc.collect()
        torch.cuda.empty_cache()
    monkeypatch.setattr(compiled, "is_switched_on", lambda: False)
    yield
    controls.reset()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


if IS_INSIDE:

    def pytest_runtest_logreport(report: pytest.TestReport) -> None:
        with Path(os.environ[REPORTS]).open("a") as file:
            file.write(json.dumps(_config.hook.pytest_report_to_serializable(config=_config, report=report)))
            file.write("\n")

    def pytest_configure(config: pytest.Config) -> None:
        global _config  # noqa: PLW0603
        _config = config

else:

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if FOLDER not in item.path.parents:  # pytest asks this of every test
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in _reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(session: pytest.Session) -> None:
        for inside in session.config.stash.get(_INSIDE, {}).values():
            inside.end()


def _reports_of(item: pytest.Item) -> list[pytest.TestReport]:
    reason = build.why_not()
    if reason is not None:
        # Where everything is checked, it is checked that this is.
        is_fault = os.environ.get("CI") == "true"
        return [_report(item, "failed" if is_fault else "skipped", f"no simulated CUDA runtime: {reason}")]
    started = item.config.stash.setdefault(_INSIDE, {})
    group = _group_of(item)
    if group not in started:
        items = [other for other in item.session.items if FOLDER in other.path.parents]
        started[group] = Inside(gpu_of(item), [other for other in items if _group_of(other) == group])
    return started[group].reports_of(item)


def _group_of(item: pytest.Item) -> tuple[Gpu, Path | None]:
    """What shares a process: where pytest itself has several (``-n``), a file is run by one of them."""
    return gpu_of(item), item.path if hasattr(item.config, "workerinput") else None


class Inside:
    """One process with a simulated GPU, which runs all tests of one kind of GPU in order."""

    def __init__(self, gpu: Gpu, items: list[pytest.Item]) -> None:
        self._work = tempfile.TemporaryDirectory(prefix="fake-cuda-")
        self._rows = Path(self._work.name) / "reports.jsonl"
        self._output = Path(self._work.name) / "output.txt"
        self._rows.touch()
        names = Path(self._work.name) / "tests.txt"
        names.write_text("\n".join(item.nodeid for item in items))
        environment = {**build.environment(*gpu), REPORTS: str(self._rows)}
        options = ["-m", "fake_cuda", "-p", "no:cacheprovider", "--rootdir", str(build.ROOT)]
        command = [sys.executable, "-m", "pytest", *options, f"@{names}"]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=build.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Those of one test, as soon as it has ended."""
        while True:
            has_ended = self._process.poll() is not None
            rows = [
                json.loads(line)
                for line in self._rows.read_text().splitlines(keepends=True)
                if line.endswith("\n")
            ]
            own = [row for row in rows if row["nodeid"] == item.nodeid]
            if any(row["when"] == "teardown" for row in own):
                hook = item.config.hook
                return [hook.pytest_report_from_serializable(config=item.config, data=row) for row in own]
            if has_ended:
                tail = "\n".join(self._output.read_text(errors="replace").splitlines()[-40:])
                return [
                    _report(item, "failed", f"its process ended with {self._process.returncode}:\n{tail}")
                ]
            time.sleep(0.05)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._work.cleanup()


_INSIDE = pytest.StashKey[dict[tuple[Gpu, Path | None], Inside]]()


def _report(item: pytest.Item, outcome: str, text: str) -> pytest.TestReport:
    is_skipped = outcome == "skipped"
    place = (str(item.path), item.location[1] or 0, f"Skipped: {text}")
    return pytest.TestReport(
        nodeid=item.nodeid, location=item.location, keywords={}, when="setup" if is_skipped else "call",
        outcome=outcome, longrepr=place if is_skipped else text,
    )  # fmt: skip

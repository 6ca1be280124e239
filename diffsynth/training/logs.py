"""What a run writes down: a CSV that survives restarts, and TensorBoard's event file.

Lightning's own CSV logger deletes the rows of an earlier start, and its TensorBoard logger needs a package
that is large for what it does here; both formats are a few lines.
"""

from __future__ import annotations

import csv
import hashlib
import os
import struct
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from diffsynth.errors import ArgumentError, MissingPackageError
from diffsynth.video.paths import replacing

OTHER_LOGGERS = {
    "wandb": ("wandb", "init"),
    "swanlab": ("swanlab.integration.pytorch_lightning", "SwanLabLogger"),
}  # name -> what must be there to import


class RunLog(Logger):
    """A logger of one folder; subclasses write one kind of file.

    Args:
        folder: ``<output>/lightning_logs/version_N``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    def log_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The whole config lies beside, as YAML."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise NotImplementedError


class CsvLog(RunLog):
    """``metrics.csv``: a row per step, complete the moment that it stands there.

    Args:
        folder: of the run.
        columns: besides "step"; a metric of another name goes to ``others.csv``, a row per value.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        super().__init__(folder)
        self.path, self.others = folder / "metrics.csv", folder / "others.csv"
        self._columns = ["step", *columns]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if set(metrics) <= set(self._columns):
            _append(self.path, self._columns, [[_text(row.get(name)) for name in self._columns]])
        else:
            _append(
                self.others, ["step", "name", "value"], [[str(step), k, _text(v)] for k, v in metrics.items()]
            )

    def cut(self, step: int) -> None:
        """Remove the rows after ``step``, of steps that come again; the columns become this run's."""
        self._columns = keep_rows(self.path, step, self._columns)
        keep_rows(self.others, step)


def keep_rows(path: Path, step: int, columns: Sequence[str] = ()) -> list[str]:
    """Keep the rows up to a step; one that a kill cut in its middle goes too.

    Args:
        path: of a CSV whose first column is the step.
        step: the last that stays.
        columns: to have from here on: those that were not there are empty above, and none is lost.

    Returns:
        The columns of the file: those asked for, and behind them what was there besides.
    """
    if not path.is_file():
        return list(columns)
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(whole.splitlines()))
    if not rows:
        path.unlink()
        return list(columns)
    head = rows[0]
    kept = [row for row in rows[1:] if len(row) == len(head) and row[0].isdigit() and int(row[0]) <= step]
    if columns and list(columns) != head:
        named = [dict(zip(head, row, strict=True)) for row in kept]
        head = [*columns, *(name for name in head if name not in columns)]
        kept = [[row.get(name, "") for name in head] for row in named]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *kept])
    return head


def _append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    is_new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([list(columns), *rows] if is_new else rows)


def _text(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.9g}"


class EventLog(RunLog):
    """TensorBoard's ``events.out.tfevents``: records of (length, data), each with its checksum.

    Source: TensorFlow ``lib/io/record_writer.cc``, ``util/event.proto``, ``framework/summary.proto``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._path: Path | None = None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self.folder / f"events.out.tfevents.{time.time_ns() // 10**9}.{os.getpid()}"
            self._write(_event() + _field(3, b"brain.Event:2"))
        values = b"".join(
            _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in metrics.items()
        )
        self._write(_event(step or 0) + _field(5, values))

    @rank_zero_only
    def begin_again(self, step: int) -> None:
        """Tell the viewer that what is after ``step`` is taken again: it hides those points."""
        self.log_metrics({}, step)
        self._write(_event(step + 1) + _field(7, b"\x08\x01"))  # SessionLog.START

    def _write(self, data: bytes) -> None:
        assert self._path is not None
        length = struct.pack("<Q", len(data))
        with self._path.open("ab") as file:
            file.write(length + _checksum(length) + data + _checksum(data))


def require_logger(name: str) -> None:
    """Make sure that `other_logger` will find what it needs.

    Raises:
        As it does.
    """
    if name not in OTHER_LOGGERS:
        raise ArgumentError(
            f"run.loggers names {name!r}; CSV and TensorBoard are always there, besides "
            f"{', '.join(OTHER_LOGGERS)}."
        )
    module, member = OTHER_LOGGERS[name]
    try:
        # A folder of this name, such as wandb's own, imports too, and holds nothing.
        found = getattr(import_module(module), member, None)
    except ImportError:
        found = None
    if found is None:
        raise MissingPackageError(name, "run.loggers", f"pip install {name}")


def other_logger(name: str, output: Path, config: Mapping[str, Any], folder: Path) -> Logger:
    """The logger of wandb or swanlab, by name.

    Args:
        name: of the service.
        output: of the run; where the service keeps files of its own.
        config: shown beside the curves.
        folder: of the run's logs: a run that goes on in it is the same run to wandb.

    Raises:
        MissingPackageError: when it is not installed.
        ArgumentError: for another name.
    """
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        try:
            return WandbLogger(save_dir=output, config=dict(config), id=run_id)
        except ModuleNotFoundError as error:
            raise MissingPackageError("wandb", "run.loggers", "pip install wandb") from error
    require_logger(name)
    module, member = OTHER_LOGGERS[name]
    logger = getattr(import_module(module), member)(
        project="diffsynth", config=dict(config), logdir=str(output / "swanlog")
    )
    assert isinstance(logger, Logger)
    return logger


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _field(number: int, data: bytes) -> bytes:
    """A field of bytes, of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(step: int = 0) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _crc_table()


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

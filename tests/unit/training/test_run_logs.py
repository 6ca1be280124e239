from __future__ import annotations

import struct
from pathlib import Path

import pytest

from diffsynth.errors import ArgumentError
from diffsynth.training.logs import CsvLog, EventLog, _checksum, other_logger


def test_rows_after_a_step_are_cut_and_the_rest_stays(tmp_path: Path) -> None:
    log = CsvLog(tmp_path, ["loss", "validation_loss"])
    for step in range(1, 6):
        log.log_metrics({"loss": 1 / step}, step)
        log.log_metrics({"other": float(step)}, step)
    with log.path.open("a") as file:
        file.write("6,0.1")  # a kill in the middle of a row
    CsvLog(tmp_path, ["loss", "validation_loss"]).cut(3)
    assert log.path.read_text() == "step,loss,validation_loss\n1,1,\n2,0.5,\n3,0.333333333,\n"
    assert log.others.read_text() == "step,name,value\n1,other,1\n2,other,2\n3,other,3\n"
    log.log_metrics({"loss": 0.25, "validation_loss": 2.0}, 4)
    assert log.path.read_text().splitlines()[-1] == "4,0.25,2"


def test_columns_that_a_run_gains_or_loses_on_the_way_cost_no_row(tmp_path: Path) -> None:
    log = CsvLog(tmp_path, ["loss", "loss_a"])
    for step in range(1, 4):
        log.log_metrics({"loss": 1.0, "loss_a": 2.0}, step)
    log = CsvLog(tmp_path, ["loss", "loss_b"])
    log.cut(2)
    log.log_metrics({"loss": 3.0, "loss_b": 4.0}, 3)
    log = CsvLog(tmp_path, ["loss", "loss_b"])
    log.cut(3)
    assert log.path.read_text() == "step,loss,loss_b,loss_a\n1,1,,2\n2,1,,2\n3,3,4,\n"


def test_checksums_are_masked_crc32c() -> None:
    # RFC 3720, B.4: 32 bytes of zero give 8a9136aa
    crc = 0x8A9136AA
    assert _checksum(bytes(32)) == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def test_an_event_file_is_records_that_tensorboard_reads(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.log_metrics({"loss": 0.5}, step=300)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, records = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == _checksum(data[:8])
        records.append(data[12 : 12 + length])
        assert data[12 + length : 16 + length] == _checksum(records[-1])
        data = data[16 + length :]
    assert records[0].endswith(b"\x1a\x0dbrain.Event:2")
    # step 300 as a varint; summary { value { tag: "loss" simple_value: 0.5 } }
    assert records[1][9:] == b"\x10\xac\x02" + b"\x2a\x0d\x0a\x0b\x0a\x04loss\x15" + struct.pack("<f", 0.5)


def test_an_unknown_logger_is_named() -> None:
    with pytest.raises(ArgumentError, match="names 'mlflow'"):
        other_logger("mlflow", Path(), {}, Path())


def test_a_run_that_goes_on_is_the_same_run_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", lambda **given: made.append(given))
    for folder in ("version_0", "version_0", "version_1"):
        other_logger("wandb", tmp_path, {}, tmp_path / folder)
    first, again, other = (given["id"] for given in made)
    assert first == again != other

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsynth.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    OutputPathError,
)
from diffsynth.training import checkpoints
from diffsynth.training.checkpoints import (
    State,
    checkpoint_path,
    drop_old,
    find_resume,
    read_state,
    require_room,
    require_same_run,
    version_folder,
    write_state,
)

FACTS = {"model": "dit (12)", "method": "lora", "optimizer": "adamw", "data": "34"}
STATE = State(
    step=7, epoch=2, tensors={"a.lora_A.default.weight": torch.arange(6.0).view(2, 3)},
    optimizers=[{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1}], "names": ["a"]}],
    averages=[{"a": torch.ones(2)}], facts=FACTS, metadata={"rank": "2"},
)  # fmt: skip


def written(folder: Path, step: int, age_s: float = 0.0) -> Path:
    path = checkpoint_path(folder, replace(STATE, step=step))
    write_state(path, replace(STATE, step=step))
    path.with_suffix(".safetensors").write_bytes(b"export")
    moment = time.time() - age_s
    os.utime(path, (moment, moment))
    return path


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, STATE)
    assert path == tmp_path / "checkpoints" / "epoch=2-step=7.ckpt"
    write_state(path, STATE)
    found = read_state(path)
    assert (found.step, found.epoch, found.facts, found.metadata) == (7, 2, FACTS, {"rank": "2"})
    assert torch.equal(found.tensors["a.lora_A.default.weight"], STATE.tensors["a.lora_A.default.weight"])
    assert found.optimizers[0]["names"] == ["a"] and torch.equal(found.averages[0]["a"], torch.ones(2))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint_path(tmp_path, STATE)
    write_state(path, STATE)
    before = path.read_bytes()

    def full(self: object, data: bytes) -> int:
        error = OSError(errno.ENOSPC, "No space left on device")
        self.error = error  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(checkpoints._Noting, "write", full)
    with pytest.raises(OutputPathError, match="No space left on device"):
        write_state(path, replace(STATE, epoch=3))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_disk_too_small_is_told_before_the_first_step(tmp_path: Path) -> None:
    require_room(tmp_path / "new", 1000)
    with pytest.raises(OutputPathError, match=r"about 1000000000\.00 GB and two must fit"):
        require_room(tmp_path, 10**18)


def test_the_last_written_is_latest_and_only_so_many_are_kept(tmp_path: Path) -> None:
    folder = version_folder(tmp_path, None)
    assert folder == tmp_path / "lightning_logs" / "version_0"
    assert find_resume("latest", tmp_path) is None and find_resume(None, tmp_path) is None
    old = [written(folder, step, age_s) for step, age_s in ((40, 30), (50, 20), (20, 10))]
    # a run went back to an earlier step: the highest number is not the latest
    assert find_resume("latest", tmp_path) == old[2]
    newest = written(folder, 30)
    drop_old(folder, 2, newest)
    assert sorted(p.name for p in newest.parent.iterdir()) == [
        f"epoch=2-step={step}{end}" for step in (20, 30) for end in (".ckpt", ".safetensors")
    ]
    assert version_folder(tmp_path, newest) == folder
    assert version_folder(tmp_path / "elsewhere", newest).name == "version_0"
    assert version_folder(tmp_path, None).name == "version_1"
    assert version_folder(tmp_path, None, goes_on=True).name == "version_0"
    assert find_resume(str(folder), tmp_path) == newest
    with pytest.raises(CheckpointNotFoundError, match="where no checkpoint"):
        find_resume(str(tmp_path / "none.ckpt"), tmp_path)


def test_another_model_is_refused_and_other_data_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.ckpt"
    with pytest.raises(ArgumentError, match=r"trained with model dit \(12\), and this run has other \(56\)"):
        require_same_run(path, STATE, {**FACTS, "model": "other (56)"})
    with pytest.raises(ArgumentError, match="optimizer adamw, and this run has sgd"):
        require_same_run(path, STATE, {**FACTS, "optimizer": "sgd"})
    require_same_run(path, STATE, {**FACTS, "data": "99"})
    assert "data was 34 and is 99 now" in caplog.text


def test_files_that_are_no_state_are_told(tmp_path: Path) -> None:
    write_state(tmp_path / "whole.ckpt", STATE)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="go on from an earlier checkpoint"):
        read_state(tmp_path / "cut.ckpt")
    torch.save({"blocks.0.x": torch.ones(1)}, tmp_path / "v1.ckpt")
    with pytest.raises(CheckpointError, match=r"run\.start_from takes the weights alone"):
        read_state(tmp_path / "v1.ckpt")
    torch.save({"diffsynth": os.system}, tmp_path / "hostile.ckpt")
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        read_state(tmp_path / "hostile.ckpt")

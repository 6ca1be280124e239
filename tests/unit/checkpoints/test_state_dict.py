"""`load_state_dict`: what is in a file, as it is there, and nothing run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth import load_state_dict
from diffsynth.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError

WEIGHT = torch.arange(6.0).reshape(2, 3)


def test_tensors_come_by_their_names_whatever_the_file_is_called(tmp_path: Path) -> None:
    save_file({"a.weight": WEIGHT.bfloat16(), "count": torch.tensor(3)}, tmp_path / "w.ckpt")
    torch.save({"state_dict": {"a.weight": WEIGHT}, "step": 7}, tmp_path / "w.safetensors")
    found = load_state_dict(tmp_path / "w.ckpt")
    assert found["a.weight"].dtype == torch.bfloat16 and torch.equal(found["a.weight"].float(), WEIGHT)
    wide = load_state_dict(str(tmp_path / "w.ckpt"), torch_dtype=torch.float32, device="cpu")
    assert torch.equal(wide["a.weight"], WEIGHT) and wide["count"].dtype == torch.int64
    wrapped = load_state_dict(tmp_path / "w.safetensors")
    assert torch.equal(wrapped["state_dict"]["a.weight"], WEIGHT) and wrapped["step"] == 7
    found["a.weight"].zero_()
    assert torch.equal(load_state_dict(tmp_path / "w.ckpt")["a.weight"].float(), WEIGHT), "the file stays"


def test_several_files_are_put_together(tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: WEIGHT}, tmp_path / f"{name}.safetensors")
    found = load_state_dict([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert sorted(found) == ["a", "b"]


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("harm",)


def test_what_is_no_file_of_tensors_is_told_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(UnsafeCheckpointError, match=r"harm.pth asks for more than tensors"):
        load_state_dict(tmp_path / "harm.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Harm()))
    with pytest.raises((UnsafeCheckpointError, CorruptCheckpointError)):
        load_state_dict(tmp_path / "old.pth")
    assert "harm" not in capsys.readouterr().out
    torch.save([WEIGHT], tmp_path / "list.pth")
    with pytest.raises(CorruptCheckpointError, match="holds a list"):
        load_state_dict(tmp_path / "list.pth")
    whole = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptCheckpointError, match="no complete torch file"):
        load_state_dict(tmp_path / "cut.pth")
    (tmp_path / "page.safetensors").write_text("<html>")
    with pytest.raises(CorruptCheckpointError, match="web page"):
        load_state_dict(tmp_path / "page.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"Did you mean 'cut.pth'"):
        load_state_dict(tmp_path / "cat.pth")

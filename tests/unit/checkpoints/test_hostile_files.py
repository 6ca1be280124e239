"""Files that are damaged, cut off, something else, or made to do harm."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from tests.unit.checkpoints.weights import write_header

ONE = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def with_w(**changes: object) -> dict[str, object]:
    return {"w": {**ONE["w"], **changes}}


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        pytest.param(ONE, 15, "cut off", id="one-byte-short"),
        pytest.param(ONE, 0, "cut off", id="no-weights"),
        pytest.param(ONE, 17, "1 bytes behind its last tensor", id="one-byte-more"),
        pytest.param(with_w(shape=[2, 3]), 16, "needs 24 bytes", id="shape-too-large"),
        pytest.param(with_w(shape=[2, -2]), 16, "sizes must be 0 or more", id="negative-size"),
        pytest.param(with_w(shape=[2.0, 2]), 16, "sizes must be 0 or more", id="float-size"),
        pytest.param(with_w(shape=[True, 4]), 16, "sizes must be 0 or more", id="bool-size"),
        pytest.param(with_w(shape="22"), 16, "sizes must be 0 or more", id="text-size"),
        pytest.param(with_w(dtype="F31"), 16, "unknown dtype 'F31'", id="unknown-dtype"),
        pytest.param(with_w(dtype=None), 16, "unknown dtype", id="no-dtype"),
        pytest.param(
            with_w(data_offsets=[16, 0]), 16, "needs 16 bytes, the header gives it -16", id="backwards"
        ),
        pytest.param(with_w(data_offsets=[4, 20]), 20, "leaves a hole", id="hole"),
        pytest.param(with_w(data_offsets=[0]), 16, r"expected \[begin, end\]", id="one-offset"),
        pytest.param(
            with_w(data_offsets=[2**70, 2**70 + 16]), 16, "leaves a hole", id="offset-beyond-any-file"
        ),
        pytest.param({**ONE, "v": ONE["w"]}, 16, "overlaps", id="overlap"),
        pytest.param({"w": 3}, 16, "tensor 'w'", id="entry-is-a-number"),
        pytest.param([], 0, "not an object", id="header-is-a-list"),
        pytest.param({**ONE, "__metadata__": {"a": 1}}, 16, "__metadata__", id="metadata-of-numbers"),
        pytest.param(b'{"w": {"dtype"', 16, "not JSON", id="cut-json"),
        pytest.param(b'{"w\xff": 1}', 16, "not JSON", id="no-utf8"),
        pytest.param(b'{"a":' * 200_000, 16, "not JSON", id="deep-json"),
        pytest.param(b'{"w": 1, "w": 2}', 16, "twice", id="one-name-twice"),
    ],
)
def test_a_header_that_lies_is_refused(header: object, num_bytes: int, message: str, tmp_path: Path) -> None:
    path = write_header(tmp_path / "model.safetensors", header, num_bytes)
    with pytest.raises(CorruptCheckpointError, match=message):
        Checkpoint.open(path)


@pytest.mark.parametrize("length", [17, 2**40, 2**63, 2**64 - 1])
def test_a_header_cannot_be_longer_than_its_file(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"w": 1}' * 2)
    with pytest.raises(CorruptCheckpointError, match="should have"):
        Checkpoint.open(path)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**32).to_bytes(8, "little") + b"{")
        file.truncate(2**33)
    with pytest.raises(CorruptCheckpointError, match="at most 100000000"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "is empty"),
        ("a.pth", b"", "is empty"),
        ("a.safetensors", b"\x10\0\0", "no complete safetensors"),
        ("a.safetensors", b"This is a readme, not a model.\n", "is a text"),
        (
            "a.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
            "git lfs pull",
        ),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        ("a.safetensors", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("a.safetensors", b"\n <html>sign in</html>", "web page"),
        ("a.pth", b"Not a model at all, but long enough.", "neither a torch file nor safetensors"),
        ("a.pth", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch.save"),
        ("a.pth", b"PK\x03\x04" + b"\0" * 100, "no complete torch file"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message):
        Checkpoint.open(path)


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64)
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        Checkpoint.open(tmp_path / "a.gguf")


def test_the_kind_is_told_by_the_content_not_the_suffix(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3)}
    save_file(weights, tmp_path / "really_safetensors.pth")
    torch.save(weights, tmp_path / "really_torch.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(Checkpoint.open(path).tensor("w"), weights["w"])


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.randn(5), "b": torch.randn(2, 2)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.randn(5)}, tmp_path / "b.pth")
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(CorruptCheckpointError):
                Checkpoint.open(path)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_any_byte_may_be_wrong(kind: str, tmp_path: Path) -> None:
    """Whatever is damaged, the answer is a tensor or an error of ours: no crash, no foreign exception."""
    weights = {"a": torch.randn(5), "b.c": torch.nn.Parameter(torch.randn(2, 2)), "d": torch.zeros(2).half()}
    path = tmp_path / f"a.{kind}"
    if kind == "pth":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for wrong in (0, 0xFF, whole[place] ^ 0x20):
            path.write_bytes(whole[:place] + bytes([wrong]) + whole[place + 1 :])
            with contextlib.suppress(CheckpointError):
                checkpoint = Checkpoint.open(path)
                for name in checkpoint.shapes:
                    checkpoint.tensor(name)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(5000)}, path)
    checkpoint = Checkpoint.open(path)
    os.truncate(path, 100)
    with pytest.raises(CorruptCheckpointError, match="something is still writing"):
        checkpoint.tensor("a")


# pickles


class _Runs:
    def __init__(self, call: object, *args: object) -> None:
        self._reduced = (call, args)

    def __reduce__(self) -> object:
        return self._reduced


def write_pickle(path: Path, content: object, name: str = "archive") -> Path:
    raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data.pkl", raw)
        archive.writestr(f"{name}/data/0", b"\0" * 64)
    return path


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda p: _Runs(os.system, f"touch {p}"), "system"),
        (lambda p: _Runs(eval, f"open({str(p)!r}, 'w')"), "builtin__.eval"),
        (lambda p: _Runs(exec, f"open({str(p)!r}, 'w')"), "builtin__.exec"),
        (lambda p: _Runs(getattr, 3, "real"), "builtin__.getattr"),
        (lambda p: _Runs(torch.load, str(p)), "torch.serialization.load"),
        (lambda p: _Runs(__import__, "antigravity"), "builtin__.__import__"),
        (lambda p: {"epoch": Path("x"), "state_dict": {}}, "pathlib"),
        (lambda p: _Runs(torch.nn.Linear, 2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_not_run(
    content: object, name: str, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    path = write_pickle(tmp_path / "evil.pth", {"weights": content(witness)})  # type: ignore[operator]
    with pytest.raises(UnsafeCheckpointError, match=name.replace(".", r"\.")):
        Checkpoint.open(path)
    assert not witness.exists()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = (
    b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ"  # 16 floats, key "0"
)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        pytest.param(b"K\0(K\x04K\x04t(K\x04K\x01t\x89NtR", None, id="good"),
        pytest.param(b"K\x01(K\x04K\x04t(K\x04K\x01t\x89NtR", "ends outside", id="starts-too-late"),
        pytest.param(b"K\0(K\x04K\x05t(K\x04K\x01t\x89NtR", "ends outside", id="too-many-columns"),
        pytest.param(b"K\0(K\x04K\x04t(K\x64K\x01t\x89NtR", "ends outside", id="stride-too-long"),
        pytest.param(b"K\0(J\xff\xff\xff\xffK\x04t(K\x04K\x01t\x89NtR", "shape", id="negative-size"),
        pytest.param(b"J\xff\xff\xff\xff(K\x04K\x04t(K\x04K\x01t\x89NtR", "shape", id="negative-start"),
        pytest.param(b"K\0(K\x04K\x04t(K\x04t\x89NtR", "stride", id="one-stride-too-few"),
        pytest.param(
            b"K\0(K\x04K\x04t(K\x04K\x01t\x89NtR}X\x01\0\0\0aK\x01sb", "a change of", id="changed-by-BUILD"
        ),
    ],
)
def test_a_tensor_must_lie_inside_its_storage(tail: bytes, message: str | None, tmp_path: Path) -> None:
    program = b"\x80\x02}X\x01\0\0\0w" + REBUILD + STORAGE + tail + b"s."
    path = write_pickle(tmp_path / "a.pth", program)
    if message is None:
        assert Checkpoint.open(path).tensor("w").tolist() == [[0.0] * 4] * 4
        return
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param(b"\x80\x02}.", "no dict of tensors", id="empty-dict"),
        pytest.param(b"\x80\x02]K\x01a.", "no dict of tensors", id="list"),
        pytest.param(b"\x80\x02}X\x01\0\0\0wK\x01s.", "no dict of tensors", id="no-tensor"),
        pytest.param(
            b"\x80\x02}K\x01" + REBUILD + STORAGE + b"K\0)(t\x89NtRs.",
            "something else than texts",
            id="numbers-as-names",
        ),
        pytest.param(b"\x80\x02garbage", "cannot be read", id="garbage"),
        pytest.param(b"\x80\x02" + b"(" * 200_000 + b".", "cannot be read", id="marks-only"),
        pytest.param(
            b"\x80\x02" + STORAGE.replace(b"\x000X", b"\x009X") + b".", "not in the file", id="absent-storage"
        ),
        pytest.param(b"\x80\x02K\x01Q.", "expected a storage", id="persistent-number"),
        pytest.param(
            b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of FloatStorage", id="storage-type-called"
        ),
        pytest.param(b"\x80\x02ctorch\nFloatStorage\n}b.", "a change of", id="storage-type-changed"),
    ],
)
def test_a_pickle_of_something_else_is_refused(program: bytes, message: str, tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "a.pth", program)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "folder.pth", "w") as archive:
        archive.writestr("model.safetensors", b"")
    with pytest.raises(CorruptCheckpointError, match=r"0 data\.pkl"):
        Checkpoint.open(tmp_path / "folder.pth")
    torch.save({"w": torch.zeros(100)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CorruptCheckpointError, match="is compressed"):
        Checkpoint.open(tmp_path / "small.pth")


def test_a_file_of_an_old_torch_says_how_to_mend_it(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptCheckpointError, match=r"Save it once more: torch\.save"):
        Checkpoint.open(tmp_path / "old.pth")


@pytest.mark.parametrize(
    "wrapper",
    ["state_dict", "module", "model_state", "model", "generator", "generator_ema", "a_name_of_ones_own"],
)
def test_a_wrapped_dict_is_unwrapped(wrapper: str, tmp_path: Path) -> None:
    weights = OrderedDict(w=torch.randn(2, 3), p=torch.nn.Parameter(torch.randn(2)))
    content = {wrapper: weights, "epoch": 3, "name": "run", "lr": [1e-4, None, True]}
    content |= {} if wrapper == "a_name_of_ones_own" else {"step": torch.tensor(7)}
    torch.save({"module": {"state_dict": content}} if wrapper == "model" else content, tmp_path / "a.ckpt")
    checkpoint = Checkpoint.open(tmp_path / "a.ckpt")
    assert list(checkpoint.shapes) == ["w", "p"]
    assert torch.equal(checkpoint.tensor("p"), weights["p"].detach())


def test_the_averaged_generator_is_read_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diffsynth")
    content = {name: {"w": torch.full((2,), float(i))} for i, name in enumerate(("critic", "generator"))}
    torch.save({**content, "generator_ema": {"w": torch.full((2,), 7.0)}}, tmp_path / "a.pt")
    assert Checkpoint.open(tmp_path / "a.pt").tensor("w").tolist() == [7.0, 7.0]
    assert "the weights under 'generator_ema' are read, not those under generator" in caplog.text
    torch.save({"critic": content["critic"], "other": content["generator"]}, tmp_path / "b.pt")
    with pytest.raises(CorruptCheckpointError, match="several others: critic, other"):
        Checkpoint.open(tmp_path / "b.pt")


def test_a_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CorruptCheckpointError, match="holds no dict of tensors"):
        Checkpoint.open(tmp_path / "a.pt")


def test_state_dict_attributes_do_no_harm(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    checkpoint = Checkpoint.open(tmp_path / "a.pth")
    assert set(checkpoint.shapes) == set(model.state_dict())
    assert checkpoint.tensor("1.num_batches_tracked", dtype=torch.bfloat16).dtype == torch.int64


def test_the_reader_knows_every_dtype_that_torch_saves(tmp_path: Path) -> None:
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
             "complex64", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"]  # fmt: skip
    weights = {name: torch.tensor([0, 1, 1], dtype=torch.float32).to(getattr(torch, name)) for name in names}
    torch.save(weights, tmp_path / "a.pth")
    checkpoint = Checkpoint.open(tmp_path / "a.pth")
    for name, weight in weights.items():
        stored, scale = checkpoint.stored(name)
        assert scale is None and stored.dtype == weight.dtype
        assert stored.view(torch.uint8).tolist() == weight.view(torch.uint8).tolist()


def test_a_path_that_does_not_exist_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    with pytest.raises(CheckpointNotFoundError, match=r"Did you mean 'Wan2\.1_VAE\.pth'"):
        Checkpoint.open(tmp_path / "Wan2.1_vae.pth")
    with pytest.raises(CheckpointNotFoundError, match="does not exist either"):
        Checkpoint.open(tmp_path / "models" / "a.pth")
    with pytest.raises(FileNotFoundError):
        Checkpoint.open("")


def test_nothing_is_imported_from_a_pickle(tmp_path: Path) -> None:
    program = b"\x80\x02cthis_module_would_be_imported\nThing\n."
    with pytest.raises(UnsafeCheckpointError, match="this_module_would_be_imported"):
        Checkpoint.open(write_pickle(tmp_path / "a.pth", program))
    assert "this_module_would_be_imported" not in sys.modules

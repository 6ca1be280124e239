"""From what a user names to the files of each model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.files import group_files
from diffsynth.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingShardError,
)
from tests.unit.checkpoints.weights import write_sparse


def shard(folder: Path, number: int, count: int = 6, stem: str = "diffusion_pytorch_model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
    return write_sparse(folder / name, {f"blocks.{number}.w": (2, 2)}, metadata={"shard": str(number)})


def single(path: Path, name: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_sparse(path, {name: (3,)})


def names(groups: list[object]) -> list[list[str]]:
    return [[path.name for path in group.paths] for group in groups]  # type: ignore[attr-defined]


def test_shards_find_each_other_however_they_are_given(tmp_path: Path) -> None:
    shards = [shard(tmp_path, n) for n in range(1, 7)]
    vae = single(tmp_path / "vae.safetensors")
    for given in (
        [*shards[::-1], vae],
        [vae, *shards],
        [str(tmp_path / "diffusion*"), vae],
        [shards, vae],
        [tmp_path],
    ):
        groups = group_files(given)
        assert sorted(len(group.paths) for group in groups) == [1, 6]
        (six,) = [group for group in groups if len(group.paths) == 6]
        assert sorted(six.paths) == sorted(shards)


def test_shards_of_two_experts_in_one_flat_list_are_kept_apart(tmp_path: Path) -> None:
    high = [shard(tmp_path / "high_noise_model", n, 2) for n in (1, 2)]
    low = [shard(tmp_path / "low_noise_model", n, 2) for n in (1, 2)]
    groups = group_files([high[0], low[0], high[1], low[1]])
    assert [group.paths for group in groups] == [tuple(high), tuple(low)]


@pytest.mark.parametrize("is_inner", [False, True], ids=["flat", "inner-list"])
def test_shards_from_two_folders_are_one_model(is_inner: bool, tmp_path: Path) -> None:
    shards = [shard(tmp_path / ("disk_a" if n < 3 else "disk_b"), n, 4) for n in range(1, 5)]
    vae = single(tmp_path / "disk_a" / "vae.safetensors")
    mixed = [shards[3], shards[0], shards[2], shards[1]]
    groups = group_files([mixed, vae] if is_inner else [vae, *mixed])
    assert sorted(len(group.paths) for group in groups) == [1, 4]
    assert len(Checkpoint.open_all([mixed] if is_inner else mixed)[0]) == 4


@pytest.mark.parametrize("is_inner", [False, True], ids=["flat", "inner-list"])
def test_halves_of_two_models_are_not_put_together(is_inner: bool, tmp_path: Path) -> None:
    halves = [shard(tmp_path / f"{role}_noise_model", n, 2) for n, role in ((1, "high"), (2, "low"))]
    with pytest.raises(MissingShardError, match="1 of 2 missing"):
        group_files([halves] if is_inner else halves)
    whole = [shard(tmp_path / folder, n, 2) for folder in ("a", "b") for n in (1, 2)]
    mixed = [whole[0], whole[3]]
    with pytest.raises(MissingShardError, match="in the folder but were not given"):
        group_files([mixed] if is_inner else mixed)
    with pytest.raises(CheckpointError, match="not shards of one model"):
        Checkpoint.open(whole)


@pytest.mark.parametrize("given", ["flat", "inner-list", "glob", "folder"])
def test_a_missing_shard_is_named(given: str, tmp_path: Path) -> None:
    shards = [shard(tmp_path, n) for n in (1, 2, 3, 5, 6)]
    paths = {
        "flat": shards,
        "inner-list": [shards],
        "glob": str(tmp_path / "*.safetensors"),
        "folder": tmp_path,
    }[given]
    with pytest.raises(
        MissingShardError, match=r"1 of 6 missing: diffusion_pytorch_model-00004-of-00006\.safetensors"
    ):
        group_files(paths)


def test_one_shard_alone_says_that_the_others_were_not_given(tmp_path: Path) -> None:
    shards = [shard(tmp_path, n) for n in range(1, 7)]
    with pytest.raises(MissingShardError, match=r"5 of 6 missing.*were not given: give the folder"):
        group_files(shards[1])
    shards[0].unlink()
    with pytest.raises(MissingShardError, match=r"1 of 6 missing.*00001-of-00006"):
        group_files([*shards[1:], shards[0]])


def test_an_index_names_its_shards(tmp_path: Path) -> None:
    for name in ("part_a.safetensors", "part_b.safetensors"):
        write_sparse(tmp_path / name, {name: (2,)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: n for n in ("part_a.safetensors", "part_b.safetensors")}}))
    for given in (index, [index], tmp_path, [tmp_path, index]):
        assert names(group_files(given)) == [["part_a.safetensors", "part_b.safetensors"]]  # type: ignore[arg-type]
    assert len(Checkpoint.open(index)) == 2
    (tmp_path / "part_b.safetensors").unlink()
    for given in (index, tmp_path):
        with pytest.raises(
            MissingShardError, match=r"names 2 shards; 1 of them is not in .*part_b\.safetensors"
        ):
            group_files(given)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"w": 3}}',
     '{"weight_map": {"w": "../secret.safetensors"}}', '{"weight_map": {"w": "/etc/passwd"}}'],
)  # fmt: skip
def test_a_bad_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptCheckpointError, match="index"):
        group_files(tmp_path / "m.safetensors.index.json")


def test_an_official_folder_gives_its_networks_and_no_tools(tmp_path: Path) -> None:
    for name in ("diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        single(tmp_path / name)
    single(tmp_path / "google" / "umt5-xxl" / "weights.bin")
    single(tmp_path / "process_checkpoint" / "det.pt")
    assert sorted(names(group_files(tmp_path))) == [
        ["Wan2.1_VAE.pth"],
        ["diffusion_pytorch_model.safetensors"],
        ["models_t5_umt5-xxl-enc-bf16.pth"],
    ]


def test_a_folder_with_two_experts_gives_both(tmp_path: Path) -> None:
    for expert in ("high_noise_model", "low_noise_model"):
        for number in (1, 2):
            shard(tmp_path / expert, number, 2)
    single(tmp_path / "Wan2.1_VAE.pth")
    assert [len(group.paths) for group in group_files(tmp_path)] == [1, 2, 2]


def test_a_diffusers_folder_gives_the_parts_of_its_index(tmp_path: Path) -> None:
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        single(tmp_path / part / "model.safetensors")
    single(tmp_path / "text_encoder" / "pytorch_model.bin")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    folders = [group.paths[0].parent.name for group in group_files(tmp_path)]
    assert folders == ["transformer", "vae", "text_encoder"]
    assert all(group.from_folder for group in group_files(tmp_path))


def test_a_folder_without_weights_says_where_they_are(tmp_path: Path) -> None:
    single(tmp_path / "Wan-AI" / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"holds no weights.*These folders in it do: Wan-AI"):
        group_files(tmp_path)


@pytest.mark.parametrize("paths", [[], [[]], "", [""]])
def test_nothing_given_is_an_error(paths: list[object]) -> None:
    with pytest.raises(CheckpointNotFoundError, match="give"):
        group_files(paths)  # type: ignore[arg-type]


def test_a_glob_that_finds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="finds no weights"):
        group_files(str(tmp_path / "*.safetensors"))


def test_brackets_in_a_name_are_no_glob(tmp_path: Path) -> None:
    path = single(tmp_path / "model [fp16].safetensors")
    assert [group.paths for group in group_files(str(path))] == [(path,)]


def test_one_open_is_one_model(tmp_path: Path) -> None:
    single(tmp_path / "a.safetensors")
    single(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"files of 2 models \(a.safetensors; b.safetensors\)"):
        Checkpoint.open(tmp_path)
    assert len(Checkpoint.open_all(tmp_path)) == 2
    with pytest.raises(CheckpointError, match="these are not shards of one model"):
        Checkpoint.open([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    shards = [shard(tmp_path, n, 3) for n in (1, 2, 3)]
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.paths == tuple(shards)
    assert list(checkpoint.shapes) == ["blocks.1.w", "blocks.2.w", "blocks.3.w"]
    assert checkpoint.num_bytes == 24 and checkpoint.num_parameters == 12
    assert checkpoint.metadata == {"shard": "1"}


def test_folders_that_are_passed_over_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("vae", "my-dit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    with caplog.at_level("WARNING", logger="diffsynth"):
        groups = group_files(tmp_path)
    assert [path.parent.name for group in groups for path in group.paths] == ["vae"]
    assert "my-dit" in caplog.text and "by name" in caplog.text

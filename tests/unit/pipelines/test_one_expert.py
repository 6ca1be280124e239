"""One expert of a pair alone, and two DiTs that are no pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth.checkpoints import hints
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.errors import AmbiguousModelError, MissingModelError, UnusedInputError
from diffsynth.lora.dialects import write_loras
from diffsynth.lora.formats import open_loras
from diffsynth.lora.merging import merge
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.lora.files import comfy_file

CALL: dict[str, Any] = {"prompt": "a ball", "seed": 0, "output_type": "latent"}


@pytest.fixture(scope="module")
def files() -> list[str]:
    return toy_files("t2v", num_experts=2)  # high, low, text encoder, VAE


def pipeline(*paths: str | Path, **more: Any) -> WanVideoPipeline:
    manager = ModelManager(torch_dtype=torch.float32, device="cpu").load_models(list(paths))
    return WanVideoPipeline.from_model_manager(manager, **more)


def with_metadata(source: str, target: Path, **metadata: str) -> Path:
    with safe_open(source, "pt") as file:
        told = file.metadata()
    save_file(load_file(source), target, {**told, **metadata})
    return target


@pytest.mark.parametrize(("number", "role", "other"), [(0, "high", "low"), (1, "low", "high")])
@pytest.mark.parametrize("teller", ["path", "metadata"])
def test_one_expert_of_a_pair_generates_only_where_that_is_meant(
    files: list[str], tmp_path: Path, number: int, role: str, other: str, teller: str
) -> None:
    plain = tmp_path / "model.safetensors"
    shutil.copy(files[number], plain)
    expected = pipeline(plain, *files[2:])(**CALL)  # nothing says what it is: it is one model, as ever
    told = files[number] if teller == "path" else with_metadata(files[number], plain, expert=role)
    pipe = pipeline(told, *files[2:])
    steps: list[int] = []
    with pytest.raises(
        MissingModelError, match=f"is the {role}-noise expert of a pair, and the {other}-noise"
    ):
        pipe(**CALL, callback_on_step_end=lambda _, step, *__: steps.append(step))
    assert not steps and f"the {role}-noise expert of a pair, alone" in pipe.describe()
    found = pipe(**CALL, single_expert=True)
    assert (
        isinstance(found, torch.Tensor)
        and isinstance(expected, torch.Tensor)
        and torch.equal(found, expected)
    )
    assert pipe.last_settings["single_expert"] is True


def test_one_of_two_experts_that_are_loaded_is_one_expert_too(files: list[str]) -> None:
    with pytest.raises(MissingModelError, match="low-noise expert of a pair"):
        pipeline(*files, dit=files[1])(**CALL)
    with pytest.raises(UnusedInputError, match="both experts are loaded"):
        pipeline(*files)(**CALL, single_expert=True)


def test_metadata_comes_before_the_path(files: list[str], tmp_path: Path) -> None:
    pair = [with_metadata(files[1], tmp_path / "high.safetensors", expert="low"),
            with_metadata(files[0], tmp_path / "low.safetensors", expert="high")]  # fmt: skip
    pipe = pipeline(*pair, *files[2:])
    assert Path(pipe.parts.sources["dit"]).name == "low.safetensors"


@pytest.mark.parametrize(
    ("names", "is_pair"),
    [
        (("a", "b"), False),
        (("style_high", "style_low"), False),
        (("style_high_noise", "b"), True),
        (("t2v_low_noise", "t2v_high_noise"), True),
    ],
    ids=["nothing-tells", "a-word-that-may-mean-anything", "one-tells", "both-tell"],
)
def test_two_dits_of_a_size_that_has_no_pairs_are_one_only_where_something_says_so(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], is_pair: bool
) -> None:
    monkeypatch.setattr(hints, "SINGLE_DIMS", (48,))  # the toy's width
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    for path, source in zip(paths, files[:2], strict=True):
        shutil.copy(source, path)
    if is_pair:
        assert pipeline(*paths).parts.low is not None
    else:
        with pytest.raises(
            AmbiguousModelError, match=r"no released pair has their sizes\. Pick one with dit="
        ):
            pipeline(*paths)
        assert pipeline(*paths, *files[2:], dit=paths[1])(**CALL) is not None
        pair = pipeline(*paths, dit=paths[::-1])
        assert Path(pair.parts.sources["dit"]).stem == names[1]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"dim": 1536, "in_dim": 16}, True),
        ({"dim": 3072, "in_dim": 48}, True),
        ({"dim": 5120, "in_dim": 36, "image_dim": 1280}, True),
        ({"dim": 5120, "in_dim": 36, "image_dim": None}, False),
        ({"dim": 5120, "in_dim": 16}, False),
    ],
    ids=["1.3B", "TI2V-5B", "I2V-14B", "I2V-A14B", "T2V-14B-or-A14B"],
)
def test_released_sizes_that_come_in_pairs_are_known(sizes: dict[str, object], expected: bool) -> None:
    assert hints.is_of_no_pair(sizes) is expected


def test_a_converted_or_merged_file_tells_its_expert_under_any_name(files: list[str], tmp_path: Path) -> None:
    style = comfy_file(tmp_path / "style_low_noise.safetensors", {"blocks.0.self_attn.q": (48, 48)})
    write_loras(tmp_path / "style.safetensors", open_loras(style), "kohya")
    (lora,) = open_loras(tmp_path / "style.safetensors")
    assert lora.role == "low"
    merge(detect(Checkpoint.open(files[1]), ARCHITECTURES), [(lora, 1.0)], tmp_path / "merged.safetensors")
    (merged,) = detect(Checkpoint.open(tmp_path / "merged.safetensors"), ARCHITECTURES)
    assert merged.role == "low"


def test_a_role_is_a_word_of_ours(files: list[str], tmp_path: Path) -> None:
    odd = with_metadata(files[0], tmp_path / "model.safetensors", expert=json.dumps(["high"]))
    assert pipeline(odd, *files[2:])(**CALL) is not None

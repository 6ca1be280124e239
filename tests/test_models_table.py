"""Every row of the models table runs with each of its inputs, at toy width; marked slow, at real widths."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.errors import ArgumentError
from diffsynth.models.kinds import KINDS, facts_of_kind
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.table import (
    ADAPTERS,
    MODELS,
    ModelRow,
    inputs_needed,
    inputs_read,
    main,
    main_inputs,
    tables,
    with_tables,
)
from diffsynth.models.toy import toy_files
from diffsynth.models.wan.facts import config_of, facts_of
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.model_inputs import ALONE, COMPANIONS, FRAMES, companions, given
from tests.stopping import stopping_before
from tests.unit.checkpoints.weights import manifests, write_sparse

README = Path(__file__).parents[1] / "README.md"
SIDE = 64  # pixels
TEXT_DIM = 32  # of the toys

# rows that have one toy are one case
KINDS_OF_ROWS = sorted({(row.kind, row.num_experts) for row in MODELS})
CASES = [(kind, count, name) for kind, count in KINDS_OF_ROWS for name in inputs_read(facts_of_kind(kind))]
NEEDS = [(kind, count, name) for kind, count in KINDS_OF_ROWS for name in inputs_needed(facts_of_kind(kind))]


def case_id(value: object) -> str:
    return f"{value}-experts" if isinstance(value, int) else str(value)


@cache
def pipeline(kind: str, num_experts: int) -> WanVideoPipeline:
    """A toy; of several experts each has weights of its own."""
    files = [*toy_files(kind), *(toy_files(kind, seed)[0] for seed in range(1, num_experts))]
    return WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")


def make(pipe: WanVideoPipeline, arguments: Mapping[str, Any], **more: Any) -> Tensor:
    usual = {
        "prompt_embeds": torch.ones(1, 4, TEXT_DIM), "height": SIDE, "width": SIDE, "num_frames": FRAMES,
        # the second step belongs to the low-noise expert, where there is one
        "num_inference_steps": 2, "sigma_shift": 3.0, "cfg_scale": 1.0, "seed": 0, "output_type": "latent",
    }  # fmt: skip
    made = pipe(**{**usual, **arguments, **more})
    assert isinstance(made, Tensor) and made.isfinite().all()
    return made


def without(kind: str, name: str) -> dict[str, Any]:
    """What a model needs, but for one input and those that mean nothing without it."""
    needed = inputs_needed(facts_of_kind(kind))
    return given([other for other in needed if name not in (other, COMPANIONS.get(other))], SIDE, SIDE)


@pytest.mark.parametrize(("kind", "num_experts"), KINDS_OF_ROWS, ids=case_id)
def test_every_row_makes_frames(kind: str, num_experts: int) -> None:
    names = [name for name in inputs_read(facts_of_kind(kind)) if name != ALONE]
    frames = make(pipeline(kind, num_experts), given(names, SIDE, SIDE), output_type="pt")
    assert frames.shape == (1, FRAMES, 3, SIDE, SIDE)


@pytest.mark.parametrize(("kind", "num_experts"), KINDS_OF_ROWS, ids=case_id)
def test_every_row_goes_on_from_saved_steps(kind: str, num_experts: int, tmp_path: Path) -> None:
    names = [name for name in inputs_read(facts_of_kind(kind)) if name != ALONE]
    small = {"height": 32, "width": 32, "num_inference_steps": 3, "sampler": "unipc"}
    run = {**given(names, 32, 32), **small}
    pipe, file = pipeline(kind, num_experts), tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make(pipe, run, save_steps=file, save_every=2, progress_bar_cmd=stopping_before(2))
    assert torch.equal(make(pipe, run, resume_from=file, seed=None), make(pipe, run))


@pytest.mark.parametrize(("kind", "num_experts", "name"), CASES, ids=case_id)
def test_changing_one_input_changes_the_video(kind: str, num_experts: int, name: str) -> None:
    pipe = pipeline(kind, num_experts)
    needed = [other for other in inputs_needed(facts_of_kind(kind)) if other != name]
    others = {**given(needed, SIDE, SIDE), **companions(name, SIDE, SIDE)}
    ways = [{**others, **given([name], SIDE, SIDE, way)} for way in (0, 1)]
    if len(needed) == len(inputs_needed(facts_of_kind(kind))):
        ways.append(others)
    made = [make(pipe, way) for way in ways]
    assert all((one - other).abs().max() > 1e-4 for one, other in combinations(made, 2))


@pytest.mark.parametrize(("kind", "num_experts", "name"), NEEDS, ids=case_id)
def test_leaving_out_what_a_model_needs_is_an_error(kind: str, num_experts: int, name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        make(pipeline(kind, num_experts), without(kind, name))


# the table tells the truth


def matches_of(files: tuple[str, ...], folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and sizes of the networks in the released headers."""
    for file in files:
        path = write_sparse(folder / f"{file}.safetensors", manifests()[file])
        yield from ((match.name, match.config) for match in detect(Checkpoint.open(path), ARCHITECTURES))


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.title)
def test_released_models_read_what_their_toy_reads(row: ModelRow, tmp_path: Path) -> None:
    toy, widths = facts_of_kind(row.kind), set()
    for files in row.checkpoints:
        networks = dict(matches_of(files, tmp_path))
        dit = networks.pop("wan_video_dit")
        parts = {row.name: row.part for row in ARCHITECTURES}
        facts = facts_of(config_of(dit), [parts[network] for network in networks])
        assert (inputs_read(facts), inputs_needed(facts)) == (inputs_read(toy), inputs_needed(toy))
        widths.add(dit["dim"])
    assert widths == set(row.widths)


@pytest.mark.parametrize(
    ("title", "file"),
    [("speed control", "wan2.1_1.3b_speedcontrol_v1"), ("VACE module", "wan2.1_vace_14b_module_only")],
)
def test_adapters_serve_dits_of_their_width(title: str, file: str, tmp_path: Path) -> None:
    [(_, config)] = matches_of((file,), tmp_path)
    assert [adapter.width for adapter in ADAPTERS if adapter.title == title] == [config["dim"]]


def test_no_kind_of_input_and_no_toy_is_left_out() -> None:
    for name, conditioner in CONDITIONERS.items():
        fields = set(conditioner.Inputs.__dataclass_fields__)  # type: ignore[attr-defined]
        assert name == "text" or fields & set(main_inputs()), f"no input of {name} stands in the table"
    assert {row.kind for row in MODELS} == set(KINDS)
    assert {name for _, _, name in CASES} == set(main_inputs()), "an input that no model reads"


def test_the_readme_has_the_tables_of_today(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python -m diffsynth.models.table --write README.md"
    page = tmp_path / "page.md"
    page.write_text(text.replace("| Wan2.1 I2V 14B", "| Wan3"), encoding="utf-8")
    main(["--write", str(page)])
    assert page.read_text(encoding="utf-8") == text
    main([])
    assert capsys.readouterr().out == tables() + "\n"
    with pytest.raises(ArgumentError, match="has no marks"):
        with_tables("# diffsynth\n")


# real widths

RELEASED = [pytest.param(row, files, id=f"{'+'.join(files)}") for row in MODELS for files in row.checkpoints]
NUM_BLOCKS = 2  # of the DiT and of VACE
POOL = 4_194_319  # a prime: no two rows of a weight are equal


def cut(shapes: Mapping[str, tuple[int, ...]], num_blocks: int = NUM_BLOCKS) -> dict[str, tuple[int, ...]]:
    """Without the blocks behind the first ones, and without what is not read."""
    kept = {}
    for name, shape in shapes.items():
        block = re.match(r"(?:vace_blocks|blocks|visual\.transformer)\.(\d+)\.", name)
        if not name.startswith("textual.") and (block is None or int(block[1]) < num_blocks):
            kept[name] = shape
    return kept


def write_drawn(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Random bfloat16 weights that keep the size of what passes through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = {}
    for name, shape in shapes.items():
        size = prod(shape)
        drawn = pool.repeat(-(-size // POOL))[:size].reshape(shape)
        is_gain = len(shape) == 1 and name.endswith(("weight", "gamma"))
        weights[name] = drawn * (prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1) + is_gain
    save_file(weights, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Gigabytes: not kept as other folders of tests are."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "files"), RELEASED)
def test_released_widths_make_frames(row: ModelRow, files: tuple[str, ...], folder: Path) -> None:
    facts = facts_of_kind(row.kind)
    places = ["high_noise_model", "low_noise_model"] if row.num_experts == 2 else ["model"]
    paths = [
        write_drawn(folder / place / f"{file}.safetensors", cut(manifests()[file]))
        for place in places
        for file in files
    ]
    vae, side, latent = ("wan2.2_vae", 128, (48, 2, 8, 8)) if facts.holds_first_frame else (
        "wan2.1_vae", SIDE, (16, 2, SIDE // 8, SIDE // 8)
    )  # fmt: skip
    paths.append(write_drawn(folder / "vae.safetensors", manifests()[vae]))
    if facts.has_image_branch:
        # the features are those before the last block
        shapes = cut(manifests()["clip_xlm_roberta_vit_h_14"], num_blocks=3)
        paths.append(write_drawn(folder / "clip.safetensors", shapes))
    pipe = WanVideoPipeline.from_model_manager(ModelManager(torch.bfloat16, "cpu").load_models(paths))
    config = pipe.dit.config  # type: ignore[union-attr]
    assert (config.dim in row.widths, config.num_layers) == (True, NUM_BLOCKS)
    text = {
        "prompt_embeds": torch.randn(1, 4, 4096), "num_inference_steps": row.num_experts, "height": side,
        "width": side,
    }  # fmt: skip
    names = inputs_read(facts)
    together = [name for name in names if name != ALONE or "vace_reference_image" not in names]
    made = make(pipe, given(together, side, side), **text, output_type="pt")
    assert made.shape == (1, FRAMES, 3, side, side)
    needed = make(pipe, given(inputs_needed(facts), side, side), **text)
    assert needed.shape == (1, *latent)

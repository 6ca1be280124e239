"""Features together, each pair at least once: variants x LoRA x fp8 x samplers x experts x streaming.

What two features do alone is tested beside each of them; here they meet. The oracle is the model that rests
on the device as a whole: streamed, it makes the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.models.kinds import facts_of_kind
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.table import inputs_read
from diffsynth.models.toy import GENERATION, KINDS, toy_files
from diffsynth.ops.fp8 import FP8
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.model_inputs import ALONE, given
from tests.unit.lora.files import pair, write

SEED = 4  # of the table: the same rows every time
NUM_LAYERS = 4  # of which the two in the middle are kept in fp8
SIZE = (int(str(GENERATION["height"])), int(str(GENERATION["width"])))
TEXT = {"prompt_embeds": torch.ones(1, 4, 32), "negative_prompt_embeds": torch.zeros(1, 3, 32)}

FACTORS: dict[str, Sequence[str]] = {
    # text to video alone is tested with LoRAs, see tests/unit/pipelines/test_loras.py
    "kind": [kind for kind in KINDS if kind != "t2v"],
    "lora": ["none", "fuse", "attach"],
    "dtype": ["float32", "fp8"],
    "sampler": ["euler", "unipc", "dpm++"],
    "experts": ["1", "2"],
    "start": ["noise", "video"],
    "videos": ["1", "2"],
}
DTYPES = {"float32": torch.float32, "fp8": FP8}

Row = dict[str, str]
Pair = tuple[tuple[str, str], ...]


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    return set(combinations(row.items(), 2))


def pairwise(factors: Mapping[str, Sequence[str]], seed: int) -> list[Row]:
    """Few rows in which each two values of two factors meet at least once."""
    draw = Random(seed)
    missing = sorted(
        ((one, a), (other, b))
        for one, other in combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    )
    rows = []
    while missing:
        tried = []
        for _ in range(60):
            drawn = {name: draw.choice(values) for name, values in factors.items()} | dict(missing[0])
            tried.append({name: drawn[name] for name in factors})
        rows.append(max(tried, key=lambda row: len(pairs_of(row) & set(missing))))
        missing = [pair for pair in missing if pair not in pairs_of(rows[-1])]
    return rows


ROWS = pairwise(FACTORS, SEED)


@cache
def files_of(kind: str) -> tuple[str, ...]:
    """Both experts' DiTs in front."""
    first, *others = toy_files(kind, num_layers=NUM_LAYERS)
    return (first, toy_files(kind, 1, num_layers=NUM_LAYERS)[0], *others)


@cache
def pipeline(kind: str, dtype: str, experts: str) -> WanVideoPipeline:
    files = [*files_of(kind)[: int(experts)], *files_of(kind)[2:]]
    manager = ModelManager(DTYPES[dtype], "cpu").load_models(files)
    return WanVideoPipeline.from_model_manager(manager, torch_dtype=torch.float32)


@cache
def lora_file(kind: str, folder: Path) -> Path:
    """A LoRA of some layers of every block, of images and VACE too, and of all that other adapters have."""
    torch.manual_seed(SEED)
    wanted = re.compile(r"(?:vace_)?blocks\.\d+\.(?:self_attn\.q|cross_attn\.k(?:_img)?|ffn\.[02])\.weight")
    pipe = pipeline(kind, "float32", "1")
    assert pipe.parts.high is not None
    keys = {}
    for network in (pipe.parts.high.dit, *pipe.parts.high.adapters):
        is_adapter = network is not pipe.parts.high.dit
        for name, tensor in network.state_dict().items():
            start = f"diffusion_model.{name.removesuffix('.weight')}"
            is_own = is_adapter and tensor.ndim > 1 and not name.startswith("vace_blocks.")
            if is_own and tensor.ndim > 2:  # of a convolution
                keys[f"{start}.diff"] = 0.1 * torch.randn(tensor.shape)
            elif is_own or wanted.fullmatch(name):
                down, up = pair(*tensor.shape)
                keys |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    return write(folder / f"{kind}.safetensors", keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("combinations")


def latents(pipe: WanVideoPipeline, kind: str, start: str = "noise", **more: Any) -> Tensor:
    names = [name for name in inputs_read(facts_of_kind(kind)) if name != ALONE]
    if start == "video":
        # references stand in front of the latents, where a video has nothing to start from
        names = [name for name in names if name != "vace_reference_image"] + [ALONE]
    arguments = {**TEXT, **given(names, *SIZE), "seed": 0, "output_type": "latent", **more}
    made = pipe(**arguments)
    assert isinstance(made, Tensor) and made.isfinite().all()
    return made


def row_id(row: Row) -> str:
    return "-".join(row.values())


def test_the_table_meets_every_pair_in_few_rows() -> None:
    met = set().union(*(pairs_of(row) for row in ROWS))
    sizes = [len(values) for values in FACTORS.values()]
    assert len(met) == sum(a * b for a, b in combinations(sizes, 2))
    assert len(ROWS) <= sizes[0] * sizes[1] + 6, "the two longest lists alone make that many pairs"


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_streamed_equals_resident(row: Row, folder: Path) -> None:
    kind = row["kind"]
    pipe = pipeline(kind, row["dtype"], row["experts"])
    arguments: dict[str, Any] = {
        "start": row["start"], "sampler": row["sampler"], "num_videos_per_prompt": int(row["videos"]),
    }  # fmt: skip
    try:
        plain = latents(pipe, kind, **arguments) if row["lora"] != "none" else None
        if plain is not None:
            reports = pipe.load_lora(lora_file(kind, folder), mode=row["lora"])  # type: ignore[arg-type]
            assert not any(report.missing for report in reports)
        resident = latents(pipe, kind, **arguments)
        assert plain is None or (resident - plain).abs().max() > 1e-3
        pipe.enable_vram_management(num_persistent_param_in_dit=0)
        assert torch.equal(latents(pipe, kind, **arguments), resident)
    finally:
        pipe.disable_vram_management()
        pipe.unload_lora()


@pytest.mark.parametrize("kind", FACTORS["kind"])
def test_fused_equals_attached(kind: str, folder: Path) -> None:
    pipe, made = pipeline(kind, "float32", "1"), {}
    for mode in ("fuse", "attach"):
        pipe.load_lora(lora_file(kind, folder), 0.7, mode=mode)  # type: ignore[arg-type]
        made[mode] = latents(pipe, kind, num_inference_steps=1, cfg_scale=1.0, negative_prompt_embeds=None)
        pipe.unload_lora()
    # one answer of the network in float32, with the sums in another order
    assert (made["fuse"] - made["attach"]).norm() <= 1e-5 * made["fuse"].norm()

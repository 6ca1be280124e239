"""Plans of the released 14B model, from its header, and of a toy whose figures can be added up by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from diffsynth.checkpoints.dit_sizes import dit_config
from diffsynth.checkpoints.hints import Hints
from diffsynth.vram_management.plan import (
    DiTSizes,
    LayerSpec,
    MemoryPlan,
    Rates,
    layers_of_shapes,
    plan_memory,
)
from tests.unit.checkpoints.weights import manifests

GIB = 2**30
SMALL = {"height": 480, "width": 832, "num_frames": 81}
LARGE = {"height": 720, "width": 1280, "num_frames": 81}
PICTURE = {"height": 480, "width": 832, "num_frames": 1}  # few tokens: copies take longer than compute
H100 = Rates(tflops=650)


@cache
def weights(network: str, model: str, dtype: str = "BF16") -> tuple[LayerSpec, ...]:
    shapes = manifests()[model]
    return tuple(layers_of_shapes(network, shapes, dict.fromkeys(shapes, "BF16"), stored_dtype=dtype))


@cache
def dit_sizes(model: str = "wan2.1_t2v_14b") -> DiTSizes:
    return DiTSizes.from_config(dit_config(manifests()[model], Hints()))


@cache
def dit_14b(dtype: str = "BF16") -> tuple[LayerSpec, ...]:
    return weights("dit", "wan2.1_t2v_14b", dtype)


def pipeline_14b(dtype: str = "BF16") -> tuple[LayerSpec, ...]:
    return (
        *dit_14b(dtype),
        *weights("text_encoder", "umt5_xxl_enc_bf16", dtype),
        *weights("vae", "wan2.1_vae", dtype),
    )


def plan(tensors: Sequence[LayerSpec], **request: Any) -> MemoryPlan:
    return plan_memory(tensors, **{"dit": dit_sizes(), **SMALL, **request})


def phase(plan: MemoryPlan, name: str) -> Any:
    return next(phase for phase in plan.phases if phase.name == name)


def toy_layers() -> list[LayerSpec]:
    """Three blocks of 1000 elements in 2000 bytes, 256 of which make keys, and 50 elements outside."""
    return [
        LayerSpec(network="dit", name="head.weight", num_parameters=50, dtype="F32", is_matrix=False),
        *(
            LayerSpec(
                network="dit", name=f"blocks.{i}.{name}", num_parameters=n, dtype="BF16", is_matrix=True
            )
            for i in range(3)
            for name, n in (("ffn.0.weight", 872), ("cross_attn.k.weight", 128))
        ),
    ]


TOY = DiTSizes(dim=8, ffn_dim=16, num_layers=3, num_heads=2, in_dim=16, out_dim=16)

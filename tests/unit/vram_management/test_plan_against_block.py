"""A block's fullest moment, measured tensor by tensor, is what the plan says."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth.models.wan.blocks import BlockSizes, DiTBlock
from diffsynth.models.wan.stream import Call, KeySlot, KeySlots
from diffsynth.models.wan.text_tokens import TextTokens
from diffsynth.ops.fused import spans_of
from diffsynth.vram_management.activations import Workload, block_stages
from diffsynth.vram_management.plan import DiTSizes


class LiveBytes(TorchDispatchMode):
    """Adds up storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[weakref.ref[Any], int] = {}
        self._known: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given | self._known and storage.nbytes():
                    self._keep(storage)
        return out

    def _keep(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        self._known.add(address)
        reference = weakref.ref(storage, lambda ref: self._drop(ref, address))
        self._live[reference] = storage.nbytes()
        self.peak = max(self.peak, sum(self._live.values()))

    def _drop(self, reference: weakref.ref[Any], address: int) -> None:
        self._live.pop(reference, None)
        self._known.discard(address)


def no_attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Any = None, scale: Any = None) -> Tensor:
    return torch.zeros_like(q)  # what it takes does not depend on what it gives


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@torch.no_grad()
def test_a_block_takes_what_the_plan_says(dtype: torch.dtype) -> None:
    dim, tokens, chunk = 128, 24576, 512
    block = DiTBlock(BlockSizes(dim=dim, ffn_dim=2 * dim, num_heads=2)).to(dtype)
    text = TextTokens(x=torch.zeros(1, 8, dim, dtype=dtype), bias=None)
    call = Call(
        text=text, image=None, t_mod=torch.zeros(1, 1, 6, dim), spans=spans_of(None, tokens),
        self_attention=no_attention, cross_attention=no_attention, ffn_chunk_tokens=chunk, keys=KeySlots(),
    )  # fmt: skip
    rotation = torch.ones(tokens, 1, dim // 4, 2)
    x = torch.randn(1, tokens, dim).to(dtype)
    slot = KeySlot(keeps=False, keys=block.cross_attn.keys(text, None))
    with LiveBytes() as live:
        block(x, rotation, slot, call)
    stream = x.numel() * x.element_size()
    work = Workload(
        height=16, width=16, num_frames=1, device="cpu",
        compute_dtype="BF16" if dtype == torch.bfloat16 else "F32",
    )  # fmt: skip
    dit = DiTSizes(dim=dim, ffn_dim=2 * dim, num_layers=1, num_heads=2, in_dim=16, out_dim=16)
    stages = block_stages(dit, work, stream=stream, chunk_tokens=chunk)
    planned = max(size for stage, size in stages.items() if stage != "head")
    assert 0.93 * planned <= stream + live.peak <= planned + 4 * 2**20, "x itself was there before"

"""Less memory for the backward pass: blocks computed again, their inputs on the host, their weights streamed.

Letters: B batch, L tokens, D width, u the bytes of one stream of tokens, B x L x D in the compute dtype.

- "full": of each block only its input is kept (u), and the block is computed again just before its gradients.
- "keep_attention": what self-attention gave is kept too (u more), with its sums: it is not computed again.
  Its queries, keys and values are.
- offload: the inputs wait in pinned host memory; they leave while the next block computes and come back while
  the block behind is differentiated.
- `StreamedBase`: frozen weights come in for the forward pass, and in reverse order for the backward pass.

Gradients are those of a plain backward pass, bit by bit where the kernels are deterministic: the same
operations run on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from diffsynth.errors import ArgumentError
from diffsynth.models.wan.dit import WanDiT
from diffsynth.ops.attention import AttentionKernel
from diffsynth.training.offload import CheckpointOffload
from diffsynth.vram_management.flat import resting_tensors
from diffsynth.vram_management.fp8 import widening
from diffsynth.vram_management.slots import StreamCounts
from diffsynth.vram_management.streaming import BlockStream, Host, stream_blocks
from diffsynth.vram_management.visit import BlockNetwork, at_once, in_order

Mode = Literal["full", "keep_attention"]
MODES = ("full", "keep_attention")
NUM_SLOTS = 2  # of streamed blocks: one computes, one comes


@dataclass(eq=False)
class _Frame:
    """One block's turn in one step."""

    is_again: bool = False
    kept: list[_Kept] = field(default_factory=list)  # attention's results, in their order
    turn: int = 0


class Recompute:
    """Runs blocks so that the backward pass computes them again: a `RunBlock`.

    Args:
        mode: what is kept; see this module's legend.
        offload: where the inputs of blocks wait; None: on the device.
        bring_back: brings a block's weights for the backward pass; None: they are there.

    Raises:
        ArgumentError: for an unknown mode.
    """

    def __init__(
        self,
        mode: Mode = "full",
        *,
        offload: CheckpointOffload | None = None,
        bring_back: Callable[[nn.Module], None] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ArgumentError(f"gradient_checkpointing is {mode!r}; known: {', '.join(MODES)}.")
        self.mode, self._offload, self._bring_back = mode, offload, bring_back
        self.frame: _Frame | None = None  # of the block that is being computed
        self._before: list[tuple[BlockNetwork, AttentionKernel | None]] = []

    def install(self, networks: Iterable[nn.Module]) -> None:
        """Let these run their blocks so: a DiT, and adapters that have blocks of their own."""
        for network in networks:
            if not isinstance(network, BlockNetwork):
                continue
            network.run_block = self
            inner = None
            # Of self-attention alone: cross-attention has few keys, and costs less than its result takes.
            if isinstance(network, WanDiT) and self.mode == "keep_attention":
                inner = network.self_attention
                network.self_attention = _KeepingAttention(inner, self)
            self._before.append((network, inner))

    def remove(self) -> None:
        """Give the networks back as they were."""
        for network, inner in self._before:
            network.run_block = at_once
            if inner is not None and isinstance(network, WanDiT):
                network.self_attention = inner
        self._before.clear()

    def __call__(self, block: nn.Module, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``work(x)``; see `RunBlock`."""
        frame = _Frame()

        def run(x: Tensor) -> Tensor:
            if frame.is_again and self._bring_back is not None:
                self._bring_back(block)
            before, self.frame, frame.turn = self.frame, frame, 0
            try:
                return work(x)
            finally:  # the second time ends in an exception of torch's, as soon as it has what it needs
                self.frame, frame.is_again = before, True

        hooks: AbstractContextManager[Any] = self._offload.hooks() if self._offload else nullcontext()
        with hooks:
            # No dropout anywhere in a Wan network: nothing draws random numbers.
            out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return out


class _Kept:
    """What one call of an attention kernel gave, and its own small graph, which lacks q, k and v.

    Any kernel that can be differentiated serves: what it wants to keep of q, k and v is noted as a place in
    them and looked up in those that are computed again; the rest (its result and sums) is kept.
    """

    def __init__(self, kernel: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        self._sources: tuple[Tensor, ...] = ()
        with torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack):
            self.out: Tensor | None = kernel(*self.leaves)
        for leaf in self.leaves:
            leaf.data = leaf.new_empty(0)  # its memory goes; as an end of the graph it stays

    def gradients(self, sources: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
        """Of q, k and v, which are given again; None where none is wanted. Lets everything go."""
        assert self.out is not None, "differentiated twice"
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        self._sources = sources
        found = iter(torch.autograd.grad(self.out, wanted, grad))
        self._sources, self.out = (), None
        return [next(found) if leaf.requires_grad else None for leaf in self.leaves]

    def _pack(self, tensor: Tensor) -> Tensor | tuple[int, torch.Size, tuple[int, ...], int]:
        memory = tensor.untyped_storage().data_ptr()
        for index, leaf in enumerate(self.leaves):
            if leaf.untyped_storage().data_ptr() == memory and tensor.dtype == leaf.dtype:
                offset = int(tensor.storage_offset() - leaf.storage_offset())
                return index, tensor.size(), tensor.stride(), offset
        return tensor

    def _unpack(self, packed: Tensor | tuple[int, torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, size, stride, offset = packed
        source = self._sources[index]
        return source.as_strided(size, stride, source.storage_offset() + offset)


class _Attend(torch.autograd.Function):
    """Attention whose result is there already."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *inputs: Tensor) -> Tensor:
        assert kept.out is not None
        ctx.save_for_backward(*inputs)
        ctx.kept = kept
        return kept.out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None
        return (None, *kept.gradients(ctx.saved_tensors, grads[0]))


class _KeepingAttention:
    """An attention kernel that keeps what self-attention gives for the second time that a block is run."""

    def __init__(self, inner: AttentionKernel, recompute: Recompute) -> None:
        self._inner, self._recompute = inner, recompute

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """softmax(q k^T scale + bias) v; see `AttentionKernel`."""
        frame = self._recompute.frame
        if frame is None or not torch.is_grad_enabled():
            return self._inner(q, k, v, bias=bias, scale=scale)
        if not any(tensor.requires_grad for tensor in (q, k, v)):
            return self._inner(q, k, v, bias=bias, scale=scale)
        if not frame.is_again:
            frame.kept.append(_Kept(lambda *t: self._inner(*t, bias=bias, scale=scale), (q, k, v)))
        kept = frame.kept[frame.turn]
        frame.turn += 1
        out: Tensor = _Attend.apply(kept, q, k, v)  # type: ignore[no-untyped-call]
        return out

    def __repr__(self) -> str:
        return f"{self._inner!r}, its result kept for the backward pass"


class StreamedBase:
    """The frozen weights of blocks rest on the host, and come in for both passes of a training step.

    Used after `tuning.tune`: what trains is no part of the stream. Weights are never written back, and get no
    gradient. The blocks must run by a `Recompute` that has this `bring_back`.

    Args:
        networks: a DiT, and adapters; those without blocks come to the device as a whole.
        device: where they compute.
        num_slots: blocks that have room on the device; 2 suffice where blocks take equally long.
        host: "pinned" for a GPU, "pageable" for the CPU as the device, "ring" to read from the mapped file.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        device: torch.device,
        *,
        num_slots: int = NUM_SLOTS,
        host: Host | None = None,
    ) -> None:
        host = host or ("pinned" if device.type == "cuda" else "pageable")
        self._streams: list[tuple[BlockNetwork, BlockStream]] = []
        self._of_block: dict[int, BlockStream] = {}
        self._moved: list[tuple[Tensor, Tensor]] = []
        for network in networks:
            blocks = list(network.blocks) if isinstance(network, BlockNetwork) else []
            inside = {id(tensor) for block in blocks for _, tensor in resting_tensors(block)}
            for _, tensor in resting_tensors(network):
                if id(tensor) not in inside:
                    self._moved.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(device)
            if isinstance(network, BlockNetwork) and blocks:
                stream = stream_blocks(
                    blocks, type(network).__name__, device=device, num_slots=num_slots, host=host
                )
                stream.returns = True
                self._streams.append((network, stream))
                self._of_block |= {id(block): stream for block in blocks}
                network.visit = widening(network, stream)
                network.keeps_place = True

    @property
    def counts(self) -> list[StreamCounts]:
        """What was copied, for each network that has blocks."""
        return [stream.counts for _, stream in self._streams]

    def bring_back(self, block: nn.Module) -> None:
        """Bring a block's weights for its backward pass."""
        self._of_block[id(block)].bring_back(block)

    def close(self) -> None:
        """Plain networks again, on the host; what trains stays where it is."""
        for network, stream in self._streams:
            stream.close()
            network.visit = widening(network, in_order)
            network.keeps_place = False
        for tensor, resting in self._moved:
            tensor.data = resting
        self._streams.clear()
        self._moved.clear()


class _UncompiledAttention:
    """An attention kernel that torch.compile leaves out of its graph.

    Which kernel takes a call is asked of torch's C++ and of the hardware, neither of which can be traced.
    """

    def __init__(self, inner: AttentionKernel) -> None:
        self._inner = inner

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """softmax(q k^T scale + bias) v; see `AttentionKernel`."""
        return self._inner(q, k, v, bias=bias, scale=scale)

    def __repr__(self) -> str:
        return repr(self._inner)


def compile_blocks(networks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Let torch.compile compile each block, but for attention; one code serves all blocks of a network."""
    for network in networks:
        if isinstance(network, WanDiT):
            network.self_attention = _UncompiledAttention(network.self_attention)
            network.cross_attention = _UncompiledAttention(network.cross_attention)
        if isinstance(network, BlockNetwork):
            for block in network.blocks:
                block.compile(backend=backend)

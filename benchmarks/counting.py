"""What a piece of work asks of a GPU, counted on a simulated one (docs/testing.md). No figure here is a time.

The runtime counts launches, waits and copies. Bytes and floating point operations are added up as torch
dispatches them: an operation moves each tensor that it reads or writes once, a view moves nothing. So work is
run twice, for torch.compile does nothing while operations are looked at; the kernels that it generates for a
DiT (`diffsynth.ops.compiled`) are counted then, and not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffsynth.ops import compiled
from tests.fake_cuda import controls

Mark = Callable[[], None]  # called twice by what is counted: where the part that counts begins and ends
Work = Callable[[Mark], None]

aten = torch.ops.aten
# What these change they do not read.
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_}
MOVES_NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
MOVES_NOTHING |= {aten.set_, aten.resize_, aten.record_stream}


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Of one piece of work."""

    launches: int  # kernels and products
    syncs: int  # the host waited for the device
    copies: int  # between host and device
    copied_bytes: int
    pageable_bytes: int  # of these, from or to memory that is not locked: the host waits for them
    product_bytes: int  # read and written by products, attention and convolutions
    other_bytes: int  # by everything else: norms, modulation, casts, joins
    flops: int  # of products, attention and convolutions

    def as_numbers(self) -> dict[str, int]:
        return asdict(self)


def counted(work: Work) -> Counted:
    """Run ``work`` twice and count."""
    runtime: list[controls.Counts] = []
    work(lambda: runtime.append(controls.counts()))
    asked = runtime[1] - runtime[0]
    sums: list[tuple[int, int, int]] = []
    with traffic() as seen:
        work(lambda: sums.append((seen.product_bytes, seen.other_bytes, seen.flops)))
    product_bytes, other_bytes, flops = (after - before for before, after in zip(*sums, strict=True))
    return Counted(
        launches=asked.launches, syncs=asked.syncs, copies=asked.copies, copied_bytes=asked.copied_bytes,
        pageable_bytes=asked.pageable_bytes, product_bytes=product_bytes, other_bytes=other_bytes,
        flops=flops,
    )  # fmt: skip


class Traffic(TorchDispatchMode):
    """Adds up what operations move and compute on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.product_bytes = self.other_bytes = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        moved = moved_bytes(func, args, kwargs, out)
        if moved and func.overloadpacket in flop_registry:
            self.product_bytes += moved
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        else:
            self.other_bytes += moved
        return out


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count operations, and generated kernels by what they are given: each reads its arguments once."""
    seen = Traffic()

    def generated(kernel: compiled.Generated[Any], *args: Any) -> bool:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        seen.other_bytes += sum(map(num_bytes, tensors))
        if kernel is compiled.add_gated:  # the one that reads what it writes
            seen.other_bytes += num_bytes(tensors[0])
        return True

    with patch.object(compiled.Generated, "__call__", generated), seen:
        yield seen


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes on a GPU; 0 for a view, and for a copy from or to the host."""
    if func.overloadpacket in MOVES_NOTHING:
        return 0
    given, made = tensors_of((args, kwargs)), tensors_of(out)
    if not all(t.is_cuda for t in (*given, *made) if t.ndim) or not any(t.is_cuda for t in (*given, *made)):
        return 0
    arguments = func._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    changed = [
        tensor
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_of(values.get(argument.name))
    ]
    places = {tensor.untyped_storage().data_ptr() for tensor in given}
    written = changed + [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in places]
    if not written:
        return 0
    unread = {id(t) for t in changed} if func.overloadpacket in OVERWRITES or "out" in kwargs else set()
    read = {id(tensor): tensor for tensor in given if id(tensor) not in unread}
    return sum(map(num_bytes, (*read.values(), *written)))


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def num_bytes(tensor: Tensor) -> int:
    """Of what is there in memory: an axis along which a tensor is expanded is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()

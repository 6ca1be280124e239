"""VACE: a short stack of blocks beside the DiT, which reads a video with holes and hints at what fills them.

Letters: B batch, T latent frames, h w latent height and width, L tokens of the video, D width.
Each block leaves a hint behind one block of the DiT, and is computed there: one stream of tokens is alive
instead of a hint for every block. Source: Wan2.1 ``wan/modules/vace_model.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.conditioning.vace import VaceCondition
from diffsynth.errors import ArgumentError, ConfigurationError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.blocks import BlockSizes, DiTBlock
from diffsynth.ops.fp8_policy import Fp8Policy
from diffsynth.ops.fused import add, spans_of
from diffsynth.vram_management.visit import BlockNetwork

if TYPE_CHECKING:
    from diffsynth.models.wan.dit_config import DiTConfig
    from diffsynth.models.wan.stream import Call, KeySlots, TokenStream
    from diffsynth.sampling.step import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class VaceConfig:
    """Sizes of the VACE blocks: told by the file's shapes, its metadata, config.json or a rule."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_vace_blocks: int
    vace_in_dim: int = 96  # channels of the context: 2 x 16 of latents, 64 of the mask
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    vace_layers: tuple[int, ...] | None = None  # DiT blocks that take hints; None: evenly spread by `join`


class VaceBlock(DiTBlock):
    """A block of the DiT with a layer that makes its hint; the first also lets the tokens in."""

    def __init__(self, sizes: BlockSizes, *, is_first: bool) -> None:
        super().__init__(sizes)
        if is_first:
            self.before_proj = nn.Linear(sizes.dim, sizes.dim)
        self.after_proj = nn.Linear(sizes.dim, sizes.dim)


@dataclass(kw_only=True, eq=False)
class _Side:
    """One side of the guidance on its way through the VACE blocks, in one call."""

    walk: _Walk
    call: Call  # of the video's tokens alone
    rotary: Tensor  # (L, 1, d / 2, 2)
    scale: float
    context: Tensor  # (B or 1, vace_in_dim, T, h, w)
    x: Tensor  # (B, L, D): the video's tokens before the first block, then those of VACE
    video: slice  # which tokens of the DiT's stream are the video


@dataclass(eq=False)
class _Walk:
    """One visit of all VACE blocks; each stays for all sides of the guidance that run side by side."""

    adapter: VaceAdapter
    keys: list[KeySlots] = field(default_factory=list)  # of the sides
    _blocks: Iterator[nn.Module] | None = None
    _turn: int = -1
    _block: nn.Module | None = None

    def block(self, turn: int) -> VaceBlock:
        """Block ``turn``; sides ask in order, and for a turn again while it lasts."""
        blocks = self.adapter.blocks
        if self._blocks is None:
            has_keys = all(keys.hold_all(blocks) for keys in self.keys)
            self._blocks = iter(self.adapter.visit(blocks, has_keys=has_keys))
        while self._turn < turn:
            self._block = next(self._blocks)
            self._turn += 1
        assert self._turn == turn
        return cast("VaceBlock", self._block)


class VaceAdapter(DiTAdapter, BlockNetwork):
    """Hints of a video, a mask and reference pictures; see `VaceCondition`."""

    name = "vace"
    fp8_policy = Fp8Policy(blocks="vace_blocks", multiplies=("self_attn.", "ffn."))

    def __init__(self, config: VaceConfig) -> None:
        super().__init__()
        self.config = config
        sizes = BlockSizes(
            dim=config.dim, ffn_dim=config.ffn_dim, num_heads=config.num_heads, eps=config.eps,
            qk_norm=config.qk_norm, cross_attn_norm=config.cross_attn_norm,
        )  # fmt: skip
        self.vace_patch_embedding = nn.Conv3d(
            config.vace_in_dim, config.dim, config.patch_size, stride=config.patch_size
        )
        self.vace_blocks = nn.ModuleList(
            VaceBlock(sizes, is_first=i == 0) for i in range(config.num_vace_blocks)
        )
        self._turns = _turns(config.vace_layers or (), config.num_vace_blocks)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> VaceAdapter:
        """Build from plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
        names = {f.name for f in fields(VaceConfig)}
        return cls(VaceConfig(**{k: v for k, v in config.items() if k in names}))  # type: ignore[arg-type]

    @property
    def blocks(self) -> nn.ModuleList:
        """What may be streamed."""
        return self.vace_blocks

    def join(self, dit: DiTConfig) -> None:
        """Spread the hints over the DiT's blocks, unless the file says where they belong.

        Raises:
            ConfigurationError: when heads, patches or numbers of blocks do not fit.
        """
        own = self.config
        for what, ours, theirs in (
            ("heads", own.num_heads, dit.num_heads),
            ("patches", tuple(own.patch_size), tuple(dit.patch_size)),
        ):
            if ours != theirs:
                raise ConfigurationError(
                    f"VACE has {what} {ours} and the DiT {theirs}; load the pair that belongs together."
                )
        layers = own.vace_layers
        if layers is None:
            step, rest = divmod(dit.num_layers, own.num_vace_blocks)
            if rest:
                raise ConfigurationError(
                    f"{own.num_vace_blocks} VACE blocks do not spread evenly over {dit.num_layers} blocks of "
                    "the DiT. Load the DiT that they were made for, or say where they belong: vace_layers in "
                    "config.json beside the file."
                )
            layers = tuple(range(0, dit.num_layers, step))
        if max(layers) >= dit.num_layers:
            raise ConfigurationError(
                f"vace_layers is {list(layers)} and the DiT has {dit.num_layers} blocks, counted from 0; "
                "load the DiT that this VACE was made for."
            )
        self._turns = _turns(layers, own.num_vace_blocks)

    def begin(self, stream: TokenStream, memory: object, call: Call, step: Step | None = None) -> object:
        """Remember the video's tokens as they enter the DiT; None where the hints count for nothing."""
        assert isinstance(memory, VaceCondition)
        scale = memory.scale_at(step)
        if scale == 0.0:
            return None
        self._check(memory.context, stream)
        walk = cast("_Walk", call.shared.setdefault(self, _Walk(self)))
        video, length = stream.video, stream.x.shape[1]
        clock = None if stream.clock is None else stream.clock[video]
        is_whole = len(range(length)[video]) == length
        side = _Side(
            walk=walk, scale=scale, context=memory.context, video=video,
            call=call if is_whole else replace(call, spans=spans_of(clock, len(range(length)[video]))),
            rotary=stream.rotary[video], x=stream.x[:, video].clone(),
        )  # fmt: skip
        walk.keys.append(call.keys)
        return side

    def after_block(
        self, index: int, x: Tensor, state: object, memory: object, step: Step | None = None
    ) -> Tensor:
        """Run the VACE block that belongs to block ``index`` of the DiT, and add its hint to x (B, L, D)."""
        turn = self._turns.get(index)
        if turn is None or state is None:
            return x
        assert isinstance(state, _Side)
        block = state.walk.block(turn)
        slot = state.call.keys.of(block, keeps=self.keeps_keys)

        def work(tokens: Tensor) -> Tensor:
            if turn == 0:
                tokens = add(tokens, block.before_proj(self._embed(state.context)))
            out: Tensor = block(tokens, state.rotary, slot, state.call)
            return out

        if not torch.is_grad_enabled():
            state.x = work(state.x)
            x[:, state.video].add_(block.after_proj(state.x), alpha=state.scale)
            return x
        state.x = self.run_block(block, work, state.x)
        hint = self.run_block(block, block.after_proj, state.x)  # its weight travels with the block's
        whole = torch.zeros_like(x)
        whole[:, state.video] = hint
        return torch.add(x, whole, alpha=state.scale)

    def _check(self, context: Tensor, stream: TokenStream) -> None:
        frames, rows, columns = (n * p for n, p in zip(stream.grid, self.config.patch_size, strict=True))
        expected = (self.config.vace_in_dim, frames, rows, columns)
        if tuple(context.shape[1:]) != expected:
            raise ArgumentError(
                f"The VACE context has shape {tuple(context.shape)}; these latents need (B, "
                f"{', '.join(map(str, expected))}): channels, latent frames with those of references, height "
                "and width."
            )

    def _embed(self, context: Tensor) -> Tensor:
        """The patch convolution as one matrix product: its kernel is its stride. (B or 1, L, D)."""
        weight = self.vace_patch_embedding.weight
        x = context.to(weight.device, weight.dtype)
        (frames, rows, columns), (pf, ph, pw) = x.shape[2:], self.config.patch_size
        x = x.reshape(*x.shape[:2], frames // pf, pf, rows // ph, ph, columns // pw, pw)
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, weight.flatten(1), self.vace_patch_embedding.bias)


def _turns(layers: tuple[int, ...], count: int) -> dict[int, int]:
    """Block of the DiT -> VACE block whose hint follows it."""
    if layers and (list(layers) != sorted(set(layers)) or len(layers) != count):
        raise ConfigurationError(
            f"vace_layers is {list(layers)}; give the number of a DiT block for each of the {count} VACE "
            "blocks, rising."
        )
    return {layer: turn for turn, layer in enumerate(layers)}

"""The diffusion transformer of every Wan model.

It knows places, not tasks: channel planes beside the noise, text tokens, image tokens, doors for adapters
and several clocks. Everything a variant does to the transformer happens at one of these places.

Letters: B batch, C latent channels, F H W latent frames, height, width; f h w the same in patches, L = f h w
tokens; D width, K distinct times of a call. Source: Wan2.1 and Wan2.2 ``wan/modules/model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Conditions
from diffsynth.errors import ArgumentError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.blocks import BlockSizes, DiTBlock
from diffsynth.models.wan.dit_config import PLANE_ORDER, DiTConfig
from diffsynth.models.wan.probe import Probe
from diffsynth.models.wan.stream import (
    Call,
    KeySlots,
    TokenSequence,
    TokenStream,
    WholeSequence,
    read_clocks,
)
from diffsynth.models.wan.text_tokens import TextTokens, compact_padding
from diffsynth.ops.attention import AttentionKernel, attend
from diffsynth.ops.fp8_policy import Fp8Policy
from diffsynth.ops.fused import linear_float32, modulated_layer_norm, spans_of
from diffsynth.ops.rope import video_rotation
from diffsynth.vram_management.visit import BlockNetwork

if TYPE_CHECKING:
    from diffsynth.denoising.step_cache import StepCache
    from diffsynth.sampling.step import Step

FFN_CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}

# What adapters remember, by name and input: each is prepared once, whatever number of sides has it.
Memories = MutableMapping[tuple[str, int], tuple[object, object]]


@dataclass(kw_only=True)
class Branch:
    """One side of the guidance, prepared once per generation."""

    text: TextTokens  # embedded
    image: Tensor | None  # embedded image tokens, (B, 257 or 514, D)
    planes: Tensor | None  # (B, in_dim - out_dim, F, H, W)
    adapters: tuple[tuple[DiTAdapter, object], ...]  # those that have an input, with their memory of it
    side: int = 0  # names this branch's memory in a step cache
    skips: frozenset[int] = frozenset()  # blocks that are left out
    keys: KeySlots = field(default_factory=KeySlots)  # of cross-attention, filled by the first call


@dataclass(kw_only=True)
class _Pass:
    """A branch on its way through the blocks."""

    branch: Branch
    stream: TokenStream  # of this device
    call: Call
    embedded: Tensor  # (B, K, D) float32
    video: slice  # of the whole sequence
    clock: Tensor | None  # of the video
    x: Tensor
    states: tuple[object, ...] = ()  # of the branch's adapters
    before: Tensor | None = None  # x before the blocks, when a step cache wants the change
    is_cached: bool = False


class _Embeddings:
    """Times of one call, embedded once for all sides that follow the same ones."""

    def __init__(self, dit: WanDiT) -> None:
        self._dit = dit
        self._made: list[tuple[Tensor, Tensor, Tensor]] = []

    def of(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (B, K, D) and modulation (B, K, 6, D), both float32."""
        for known, embedded, t_mod in self._made:
            if known is times or torch.equal(known, times):
                return embedded, t_mod
        embedded = self._dit.embed_time(times)
        t_mod = self._dit.modulation(embedded)
        self._made.append((times, embedded, t_mod))
        return embedded, t_mod


class ImageEmbedding(nn.Module):
    """Features of the image encoder -> tokens of the DiT."""

    def __init__(self, in_dim: int, out_dim: int, num_positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(in_dim),
            nn.Linear(in_dim, in_dim),
            nn.GELU(),
            nn.Linear(in_dim, out_dim),
            nn.LayerNorm(out_dim),
        )
        if num_positions is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, num_positions, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            x = x + self.emb_pos
        return self.proj(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    """Norm, modulation by time and a projection to patches, in float32."""

    def __init__(self, dim: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        nn.init.normal_(self.modulation, std=dim**-0.5)

    def forward(self, x: Tensor, embedded_time: Tensor, clock: Tensor | None) -> Tensor:
        """X (B, L, D), embedded_time (B, K, D) -> (B, L, out_channels) float32."""
        shift, scale = (self.modulation.float()[:, None] + embedded_time[:, :, None]).unbind(2)
        y = modulated_layer_norm(x.float(), shift, scale, spans_of(clock, x.shape[1]), self.eps)
        return linear_float32(y, self.head.weight, self.head.bias)


class WanDiT(BlockNetwork):
    """The transformer; see this module's legend.

    Set from outside, beside what every `BlockNetwork` has: ``self_attention`` and ``cross_attention``, two
    kernels (perhaps wrapped, to exchange heads between devices); ``sequence``, how tokens are shared between
    devices; ``ffn_chunk_tokens``, tokens that go through a feed-forward layer at a time (None: by device).
    """

    blocks: nn.ModuleList

    fp8_policy = Fp8Policy(num_edge_blocks=1, multiplies=("self_attn.", "ffn."))

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        sizes = BlockSizes(
            dim=dim, ffn_dim=config.ffn_dim, num_heads=config.num_heads, eps=config.eps,
            qk_norm=config.qk_norm, cross_attn_norm=config.cross_attn_norm, has_image=config.image_dim is not
            None,
        )  # fmt: skip
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(DiTBlock(sizes) for _ in range(config.num_layers))
        self.head = Head(dim, math.prod(patch) * config.out_dim, config.eps)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_tokens_pos)
        self.self_attention: AttentionKernel = attend
        self.cross_attention: AttentionKernel = attend
        self.sequence: TokenSequence = WholeSequence()
        self.ffn_chunk_tokens: int | None = None

    @property
    def attention(self) -> AttentionKernel:
        """The kernel of both attentions; set, it serves both."""
        return self.self_attention

    @attention.setter
    def attention(self, kernel: AttentionKernel) -> None:
        self.self_attention = self.cross_attention = kernel

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> WanDiT:
        """Build from plain sizes, as a checkpoint's header tells them; unknown keys are left alone."""
        names = {f.name for f in fields(DiTConfig)}
        return cls(DiTConfig(**{k: v for k, v in config.items() if k in names}))  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """In which the blocks compute."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the blocks compute."""
        return self.patch_embedding.weight.device

    def prepare(
        self,
        conditions: Conditions,
        adapters: Sequence[DiTAdapter] = (),
        *,
        side: int = 0,
        skips: frozenset[int] = frozenset(),
        memories: Memories | None = None,
    ) -> Branch:
        """Embed one side of the guidance, once per generation.

        Args:
            conditions: text (B, tokens, text_dim) and the rest; see `Conditions`.
            adapters: the networks beside this DiT; those without an input in ``conditions`` are not visited.
            side: names the branch's memory in a step cache.
            skips: numbers of blocks that are left out.
            memories: what adapters remember by now, of other sides; more is added.
        """
        if beyond := [index for index in skips if not 0 <= index < len(self.blocks)]:
            raise ArgumentError(
                f"block {beyond[0]} is to be left out; this DiT has the blocks 0 to {len(self.blocks) - 1}."
            )
        text = compact_padding(conditions.text.to(self.device, self.dtype), self.config.text_len)
        if text.x.shape[-1] != self.config.text_dim:
            raise ArgumentError(
                f"text features are {text.x.shape[-1]} wide; this DiT reads {self.config.text_dim}. "
                "Use the text encoder that belongs to it."
            )
        image = None
        if self.config.image_dim is not None and conditions.image is not None:
            image = self.img_emb(conditions.image.to(self.device, self.dtype))
        return Branch(
            text=replace(text, x=self.text_embedding(text.x)),
            image=image,
            planes=self._join_planes(conditions.planes),
            adapters=tuple(
                (adapter, self._memory_of(adapter, conditions.adapters[adapter.name], memories))
                for adapter in adapters
                if adapter.name in conditions.adapters
            ),
            side=side,
            skips=skips,
        )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        branches: Sequence[Branch],
        cache: StepCache | None = None,
        step: Step | None = None,
    ) -> list[Tensor]:
        """Return one velocity (B, C, F, H, W) float32 per branch.

        Each block runs for all branches before the next block, so that its weights are needed once.

        Args:
            latents: (B, C, F, H, W); H and W multiples of the patch.
            timestep: (B,), (B, F) or (B, L), 0..1000; see `read_clocks`.
            branches: from `prepare`; guidance has 2, training 1.
            cache: may answer instead of the blocks, where there is a step.
            step: of a generation, told to adapters and the cache; None in training.
        """
        if cache is not None and step is None:
            raise ArgumentError("a step cache was given without a step; give step= too, or leave it out.")
        grid = self._grid(latents)
        clocks, embeddings = read_clocks(timestep, grid), _Embeddings(self)
        passes = [self._enter(latents, branch, grid, clocks, embeddings, step) for branch in branches]
        for one in passes:
            self._ask_cache(one, latents, cache, step)
        running = [one for one in passes if not one.is_cached]
        shared: dict[nn.Module, object] = {}
        for one in running:
            self._begin(one, shared, step)
        for index, block in self._visited(running):
            for one in running:
                if index not in one.branch.skips:
                    one.x = self._through(index, block, one, step)
                for (adapter, memory), state in zip(one.branch.adapters, one.states, strict=True):
                    one.x = adapter.after_block(index, one.x, state, memory, step)
        for one in running:
            if cache is not None and step is not None and one.before is not None:
                cache.keep(step, one.branch.side, change=one.x - one.before)
        return [self._leave(one) for one in passes]

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        if latents.ndim != 5 or latents.shape[1] != self.config.out_dim:
            raise ArgumentError(
                f"latents have shape {tuple(latents.shape)}; expected (B, {self.config.out_dim}, F, H, W)."
            )
        sizes = [divmod(n, p) for n, p in zip(latents.shape[2:], self.config.patch_size, strict=True)]
        if any(rest for _, rest in sizes):
            raise ArgumentError(
                f"latents of {tuple(latents.shape[2:])} do not divide by the patch {self.config.patch_size}."
            )
        return sizes[0][0], sizes[1][0], sizes[2][0]

    def embed_time(self, times: Tensor) -> Tensor:
        """Times (B, K), 0..1000 -> (B, K, D) float32."""
        half = self.config.freq_dim // 2
        # float64 on the CPU: near t = 1000 float32 angles are already off by 6e-5.
        angles = times[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
        # Without waiting: one side of the guidance may still compute when the other begins.
        sinusoid = sinusoid.to(self.device, non_blocking=True)
        rise, _, fall = cast("tuple[nn.Linear, nn.SiLU, nn.Linear]", tuple(self.time_embedding))
        return linear_float32(
            F.silu(linear_float32(sinusoid, rise.weight, rise.bias)), fall.weight, fall.bias
        )

    def modulation(self, embedded: Tensor) -> Tensor:
        """Embedded times (B, K, D) -> shift, scale and gate of a block's halves, (B, K, 6, D) float32."""
        project = cast("nn.Linear", self.time_projection[1])
        # One sixth at a time: the projection is the largest weight that is widened to float32.
        active = F.silu(embedded)
        parts = [
            linear_float32(active, w, b)
            for w, b in zip(project.weight.chunk(6), project.bias.chunk(6), strict=True)
        ]
        return torch.stack(parts, dim=2)

    def _join_planes(self, planes: Mapping[str, Tensor]) -> Tensor | None:
        wanted = self.config.planes
        if unknown := set(planes) - set(wanted):
            raise ArgumentError(
                f"this DiT has no plane for {', '.join(sorted(unknown))}; it has {sorted(wanted) or 'none'}."
            )
        if not wanted:
            return None
        if not planes:
            raise ArgumentError(
                f"this DiT reads planes {', '.join(wanted)} beside the noise and none was given."
            )
        shape = next(iter(planes.values())).shape
        parts = [
            planes[name].to(self.device, self.dtype) if name in planes
            else torch.zeros(shape[0], channels, *shape[2:], device=self.device, dtype=self.dtype)
            for name, channels in sorted(wanted.items(), key=lambda item: PLANE_ORDER.index(item[0]))
        ]  # fmt: skip
        return torch.cat(parts, dim=1)

    def _enter(
        self,
        latents: Tensor,
        branch: Branch,
        grid: tuple[int, int, int],
        clocks: tuple[Tensor, Tensor | None],
        embeddings: _Embeddings,
        step: Step | None,
    ) -> _Pass:
        stream = self._tokens(latents, branch, grid, clocks, step)
        embedded, t_mod = embeddings.of(stream.times)
        told = embedded
        for adapter, memory in branch.adapters:
            told = adapter.time(told, memory, step)
        if told is not embedded:
            embedded, t_mod = told, self.modulation(told)
        for adapter, memory in branch.adapters:
            t_mod = adapter.modulate(t_mod, memory, step)
        whole, stream = stream, self.sequence.split(stream)
        call = Call(
            text=branch.text, image=branch.image, t_mod=t_mod,
            spans=spans_of(stream.clock, stream.x.shape[1]), self_attention=self.self_attention,
            cross_attention=self.cross_attention, keys=branch.keys, ffn_chunk_tokens=self.ffn_chunk_tokens or
            FFN_CHUNK_TOKENS.get(self.device.type, 8192),
        )  # fmt: skip
        return _Pass(
            branch=branch, stream=stream, call=call, embedded=embedded, video=whole.video, x=stream.x,
            clock=None if whole.clock is None else whole.clock[whole.video],
        )  # fmt: skip

    def _tokens(
        self,
        latents: Tensor,
        branch: Branch,
        grid: tuple[int, int, int],
        clocks: tuple[Tensor, Tensor | None],
        step: Step | None,
    ) -> TokenStream:
        """The sequence of one side, with the tokens that adapters add."""
        x = self._embed_patches(latents, branch.planes, grid)
        for adapter, memory in branch.adapters:
            x = (
                adapter.embed(x.transpose(1, 2).reshape(x.shape[0], -1, *grid), memory, step)
                .flatten(2)
                .transpose(1, 2)
            )
        rotary = video_rotation(grid, self.config.dim // self.config.num_heads, self.device)
        times, clock = clocks
        stream = TokenStream(
            x=x, rotary=rotary, grid=grid, video=slice(0, x.shape[1]), times=times, clock=clock
        )
        for adapter, memory in branch.adapters:
            stream = adapter.extend(stream, memory, step)
        return stream if stream.times is times else stream.with_distinct_times()

    def _begin(self, one: _Pass, shared: dict[nn.Module, object], step: Step | None) -> None:
        one.call = replace(one.call, shared=shared)
        one.states = tuple(
            adapter.begin(one.stream, memory, one.call, step) for adapter, memory in one.branch.adapters
        )

    def _embed_patches(self, latents: Tensor, planes: Tensor | None, grid: tuple[int, int, int]) -> Tensor:
        """The patch convolution as one matrix product: its kernel is its stride. (B, L, D)."""
        x = latents.to(self.device, self.dtype)
        if planes is not None:
            x = torch.cat([x, planes.expand(x.shape[0], *planes.shape[1:])], dim=1)
        (f, h, w), (pf, ph, pw) = grid, self.config.patch_size
        patches = x.reshape(x.shape[0], x.shape[1], f, pf, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return F.linear(
            patches.flatten(4).flatten(1, 3),
            self.patch_embedding.weight.flatten(1),
            self.patch_embedding.bias,
        )

    def _memory_of(self, adapter: DiTAdapter, given: object, memories: Memories | None) -> object:
        if memories is None:
            return adapter.prepare(given, self)
        slot = (adapter.name, id(given))
        if slot not in memories:
            memories[slot] = (given, adapter.prepare(given, self))  # the input lives on, and its id with it
        return memories[slot][1]

    def _ask_cache(self, one: _Pass, latents: Tensor, cache: StepCache | None, step: Step | None) -> None:
        if cache is None or step is None:
            return
        probe = Probe(latents=latents, stream=one.stream, embedded=one.embedded, t_mod=one.call.t_mod)
        change = cache.recall(step, one.branch.side, probe)
        if change is None:
            one.before = one.x.clone()
        else:
            one.x, one.is_cached = one.x + change, True

    def _through(self, index: int, block: DiTBlock, one: _Pass, step: Step | None) -> Tensor:
        slot = one.branch.keys.of(block, keeps=self.keeps_keys)
        call = one.call
        for adapter, memory in one.branch.adapters:
            if type(adapter).attend is not DiTAdapter.attend:
                beside = partial(_attend_beside, adapter, index, memory, step, call.self_attention)
                call = replace(call, self_attention=beside)

        def work(x: Tensor) -> Tensor:
            out: Tensor = block(x, one.stream.rotary, slot, call)
            return out

        return self.run_block(block, work, one.x) if torch.is_grad_enabled() else work(one.x)

    def _visited(self, running: Sequence[_Pass]) -> Iterable[tuple[int, DiTBlock]]:
        if not running:
            return ()
        has_keys = all(self._holds_keys(one.branch) for one in running)
        return enumerate(cast("Iterable[DiTBlock]", self.visit(self.blocks, has_keys=has_keys)))

    def _holds_keys(self, branch: Branch) -> bool:
        return branch.keys.hold_all(b for index, b in enumerate(self.blocks) if index not in branch.skips)

    def _leave(self, one: _Pass) -> Tensor:
        """Tokens of the video -> velocity (B, C, F, H, W) float32."""
        y = self.head(self.sequence.gather(one.x)[:, one.video], one.embedded, one.clock)
        (f, h, w), (pf, ph, pw) = one.stream.grid, self.config.patch_size
        y = y.view(y.shape[0], f, h, w, pf, ph, pw, self.config.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return y.reshape(y.shape[0], self.config.out_dim, f * pf, h * ph, w * pw)  # type: ignore[no-any-return]


def _attend_beside(  # noqa: PLR0913 (what `DiTAdapter.attend` is told)
    adapter: DiTAdapter,
    index: int,
    memory: object,
    step: Step | None,
    kernel: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Self-attention of a block at which an adapter stands."""
    assert bias is None and scale is None, "self-attention has neither"
    made = adapter.attend(index, q, k, v, memory, step, kernel)
    return kernel(q, k, v) if made is None else made

"""The diffusion transformer of every Wan model.

It knows places, not tasks: channel planes beside the noise, text tokens, image tokens, five doors for
adapters and a second clock. Everything a variant does to the transformer happens at one of these places.

Letters: B batch, C latent channels, F H W latent frames, height, width; f h w the same in patches, L = f h w
tokens; D width, K distinct times of a call. Source: Wan2.1 and Wan2.2 ``wan/modules/model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Conditions
from diffsynth.errors import ArgumentError
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.blocks import BlockSizes, CrossKeys, DiTBlock
from diffsynth.models.wan.dit_config import PLANE_ORDER, DiTConfig
from diffsynth.models.wan.stream import Call, TokenStream, read_clocks
from diffsynth.models.wan.text_tokens import TextTokens, compact_padding
from diffsynth.ops.attention import AttentionKernel, attend
from diffsynth.ops.fp8_policy import Fp8Policy
from diffsynth.ops.fused import linear_float32, modulated_layer_norm, spans_of
from diffsynth.ops.rope import video_rotation
from diffsynth.vram_management.visit import RunBlock, Visit, at_once, in_order

FFN_CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}


class StepCache(Protocol):
    """May answer instead of the blocks; one memory per key (expert and side of the guidance)."""

    def recall(self, key: str, probe: Tensor) -> Tensor | None:
        """The blocks' change of x, (B, L, D), or None: run them. ``probe``: time modulation (B, K, 6, D)."""

    def keep(self, key: str, change: Tensor) -> None:
        """The blocks ran and changed x by this."""


@dataclass(kw_only=True)
class Branch:
    """One side of the guidance, prepared once per generation."""

    text: TextTokens  # embedded
    image: Tensor | None  # embedded image tokens, (B, 257 or 514, D)
    planes: Tensor | None  # (B, in_dim - out_dim, F, H, W)
    adapters: tuple[tuple[DiTAdapter, object], ...]  # those that have an input, with it
    key: str = "positive"  # names this branch's memory in a step cache
    keys: dict[int, CrossKeys] = field(
        default_factory=dict
    )  # cross-attention keys by block, filled by the first call


@dataclass(kw_only=True)
class _Pass:
    """A branch on its way through the blocks."""

    branch: Branch
    stream: TokenStream
    call: Call
    states: tuple[tuple[DiTAdapter, object], ...]
    x: Tensor
    before: Tensor | None = None  # x before the blocks, when a step cache wants the change
    is_cached: bool = False


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


class WanDiT(nn.Module):
    """The transformer; see this module's legend.

    Set from outside: ``attention``, a kernel (perhaps wrapped, to exchange heads between devices);
    ``ffn_chunk_tokens``, tokens that go through a feed-forward layer at a time (None: by device); ``visit``,
    how blocks come in for their turn; ``run_block``, how a block runs in training (`training.recompute`);
    ``keeps_keys``, whether a branch keeps each block's cross-attention keys from one step to the next.
    """

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
        self.attention: AttentionKernel = attend
        self.ffn_chunk_tokens: int | None = None
        self.visit: Visit = in_order
        self.run_block: RunBlock = at_once
        self.keeps_keys = True

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
        self, conditions: Conditions, adapters: Sequence[DiTAdapter] = (), key: str = "positive"
    ) -> Branch:
        """Embed one side of the guidance, once per generation.

        Args:
            conditions: text (B, tokens, text_dim) and the rest; see `Conditions`.
            adapters: the networks beside this DiT; those without an input in ``conditions`` are not visited.
            key: names the branch's memory in a step cache.
        """
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
                (a, conditions.adapters[a.name]) for a in adapters if a.name in conditions.adapters
            ),
            key=key,
        )

    def forward(
        self, latents: Tensor, timestep: Tensor, branches: Sequence[Branch], cache: StepCache | None = None
    ) -> list[Tensor]:
        """Return one velocity (B, C, F, H, W) float32 per branch.

        Each block runs for all branches before the next block, so that its weights are needed once.

        Args:
            latents: (B, C, F, H, W); H and W multiples of the patch.
            timestep: (B,), (B, F) or (B, L), 0..1000; see `read_clocks`.
            branches: from `prepare`; guidance has 2, training 1.
            cache: may answer instead of the blocks.
        """
        grid = self._grid(latents)
        times, clock = read_clocks(timestep, grid)
        embedded_time, t_mod = self._embed_time(times)
        passes = [self._enter(latents, branch, grid, times, clock, t_mod) for branch in branches]
        for one in passes:
            self._ask_cache(one, cache)
        running = [one for one in passes if not one.is_cached]
        for index, block in self._visited(running):
            for one in running:
                one.x = self._through(index, block, one)
                for adapter, state in one.states:
                    one.x = adapter.after_block(index, one.x, state)
        for one in passes:
            if cache is not None and one.before is not None:
                cache.keep(one.branch.key, one.x - one.before)
        return [self._leave(one, embedded_time, clock) for one in passes]

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

    def _embed_time(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B, K) -> embedding (B, K, D) and modulation (B, K, 6, D), both float32."""
        half = self.config.freq_dim // 2
        # float64 on the CPU: near t = 1000 float32 angles are already off by 6e-5.
        angles = times[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
        # Without waiting: one side of the guidance may still compute when the other begins.
        sinusoid = sinusoid.to(self.device, non_blocking=True)
        rise, _, fall = cast("tuple[nn.Linear, nn.SiLU, nn.Linear]", tuple(self.time_embedding))
        embedded = linear_float32(
            F.silu(linear_float32(sinusoid, rise.weight, rise.bias)), fall.weight, fall.bias
        )
        project = cast("nn.Linear", self.time_projection[1])
        # One sixth at a time: the projection is the largest weight that is widened to float32.
        active = F.silu(embedded)
        parts = [
            linear_float32(active, w, b)
            for w, b in zip(project.weight.chunk(6), project.bias.chunk(6), strict=True)
        ]
        return embedded, torch.stack(parts, dim=2)

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
        times: Tensor,
        clock: Tensor | None,
        t_mod: Tensor,
    ) -> _Pass:
        for adapter, given in branch.adapters:
            t_mod = adapter.modulate(t_mod, given)
        x = self._embed_patches(latents, branch.planes, grid)
        for adapter, given in branch.adapters:
            x = (
                adapter.embed(x.transpose(1, 2).reshape(x.shape[0], -1, *grid), given)
                .flatten(2)
                .transpose(1, 2)
            )
        rotary = video_rotation(grid, self.config.dim // self.config.num_heads, self.device)
        stream = TokenStream(
            x=x, rotary=rotary, grid=grid, video=slice(0, x.shape[1]), times=times, clock=clock
        )
        for adapter, given in branch.adapters:
            stream = adapter.extend(stream, given, self)
        call = Call(
            text=branch.text, t_mod=t_mod, spans=spans_of(stream.clock, stream.x.shape[1]),
            attention=self.attention, ffn_chunk_tokens=self.ffn_chunk_tokens or
            FFN_CHUNK_TOKENS.get(self.device.type, 8192),
        )  # fmt: skip
        states = tuple((adapter, adapter.begin(stream, given, call)) for adapter, given in branch.adapters)
        return _Pass(branch=branch, stream=stream, call=call, states=states, x=stream.x)

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

    def _ask_cache(self, one: _Pass, cache: StepCache | None) -> None:
        if cache is None:
            return
        change = cache.recall(one.branch.key, one.call.t_mod)
        if change is None:
            one.before = one.x.clone()
        else:
            one.x, one.is_cached = one.x + change, True

    def _through(self, index: int, block: DiTBlock, one: _Pass) -> Tensor:
        def work(x: Tensor) -> Tensor:
            # The keys are made in here: in training they depend on the block's weights.
            out: Tensor = block(x, one.stream.rotary, self._keys(index, block, one.branch), one.call)
            return out

        return self.run_block(block, work, one.x) if torch.is_grad_enabled() else work(one.x)

    def _visited(self, running: Sequence[_Pass]) -> Iterable[tuple[int, DiTBlock]]:
        if not running:
            return ()
        has_keys = all(len(one.branch.keys) == len(self.blocks) for one in running)
        has_keys = has_keys and not torch.is_grad_enabled()
        return enumerate(cast("Iterable[DiTBlock]", self.visit(self.blocks, has_keys=has_keys)))

    def _keys(self, index: int, block: DiTBlock, branch: Branch) -> CrossKeys:
        trains = torch.is_grad_enabled()
        if index in branch.keys and not trains:
            return branch.keys[index]
        keys = block.cross_attn.keys(branch.text, branch.image)
        if self.keeps_keys and not trains:
            branch.keys[index] = keys
        return keys

    def _leave(self, one: _Pass, embedded_time: Tensor, clock: Tensor | None) -> Tensor:
        """Tokens of the video -> velocity (B, C, F, H, W) float32."""
        y = self.head(one.x[:, one.stream.video], embedded_time, clock)
        (f, h, w), (pf, ph, pw) = one.stream.grid, self.config.patch_size
        y = y.view(y.shape[0], f, h, w, pf, ph, pw, self.config.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return y.reshape(y.shape[0], self.config.out_dim, f * pf, h * ph, w * pw)  # type: ignore[no-any-return]

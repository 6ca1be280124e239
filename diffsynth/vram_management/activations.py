"""How much lives on the device besides weights, at the fullest moment of each phase.

Letters: B batch, L tokens, D width, u the bytes of one stream of tokens, B x L x D in the compute dtype.
Counted after the code that allocates: ``models/wan/blocks.py``, ``dit.py``, ``text_encoder.py``, ``vae.py``
and ``ops/fused.py``; tests hold the constants equal to theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffsynth.errors import ArgumentError
from diffsynth.vram_management.layers import DTYPE_BYTES, LayerSpec
from diffsynth.vram_management.rates import DiTSizes

FLOAT32 = 4
PIECE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # of ops/fused.py: float32 worked on at a time
FFN_CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}  # of dit.py
WORKSPACE_BYTES = {"cpu": 0, "cuda": 100_000_000}  # what cuBLAS, cuDNN and attention allocate through torch
TEMPORAL_STRIDE = 4  # of every Wan VAE
LATENT_COPIES = 6  # float32: latents, noise, guided velocity and what a solver of order 3 remembers
TILE = (30, 52)  # latent positions, the pipeline's default


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is asked for, in pixels and frames; sizes are taken up to the next that the networks can."""

    height: int
    width: int
    num_frames: int
    num_branches: int = 2  # sides of the guidance; 1 without
    batch: int = 1
    text_tokens: int = 512  # at most, of each prompt
    image_tokens: int = 0
    compute_dtype: str = "BF16"
    device: str = "cuda"
    multiplies_fp8: bool = False  # self-attention's projections and the feed-forward, on tokens in fp8

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_branches", "batch"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("text_tokens", "image_tokens"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.compute_dtype not in ("BF16", "F16", "F32"):
            raise ArgumentError(f"compute_dtype is {self.compute_dtype!r}; known: 'BF16', 'F16', 'F32'.")
        if self.device not in PIECE_BYTES:
            raise ArgumentError(f"device is {self.device!r}; known: {', '.join(PIECE_BYTES)}.")

    @property
    def element_bytes(self) -> int:
        """Of a number in the compute dtype."""
        return DTYPE_BYTES[self.compute_dtype]

    @property
    def latent_frames(self) -> int:
        """F."""
        return -(-(self.num_frames - 1) // TEMPORAL_STRIDE) + 1

    def grid(self, dit: DiTSizes) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        frames, rows, columns = dit.patch_size
        return (
            -(-self.latent_frames // frames),
            -(-self.height // (dit.spatial_stride * rows)),
            -(-self.width // (dit.spatial_stride * columns)),
        )

    def tokens(self, dit: DiTSizes) -> int:
        """L."""
        frames, rows, columns = self.grid(dit)
        return frames * rows * columns

    @property
    def context_tokens(self) -> int:
        """Of text and image together, each with keys of its own."""
        return self.text_tokens + self.image_tokens


def dit_activations(
    dit: DiTSizes,
    work: Workload,
    *,
    tokens: int,
    interleaves: bool,
    ffn_chunk_tokens: int | None,
    num_vace_blocks: int = 0,
) -> int:
    """Bytes at the fullest moment of a step, without kept keys.

    Args:
        dit: its sizes.
        work: what is asked for.
        tokens: L, with those that an adapter adds.
        interleaves: both sides of the guidance are under way: one more stream.
        ffn_chunk_tokens: None is the network's default.
        num_vace_blocks: with any, VACE has a stream of its own; each hint is added as soon as it is there.
    """
    num_live = work.num_branches if interleaves else 1
    stream = work.batch * tokens * dit.dim * work.element_bytes
    chunk = min(tokens, ffn_chunk_tokens or FFN_CHUNK_TOKENS[work.device])
    stages = block_stages(dit, work, stream=stream, chunk_tokens=chunk)
    hints = stream if num_vace_blocks else 0
    waiting = (num_live - 1) * stream + num_live * hints
    return max(waiting + max(stages.values()), dit.dim**2 * FLOAT32) + _lasting(dit, work, tokens)


def block_stages(dit: DiTSizes, work: Workload, *, stream: int, chunk_tokens: int) -> dict[str, int]:
    """Bytes at each moment of a block, and in the head; ``stream`` is u."""
    as_float32 = stream * FLOAT32 // work.element_bytes
    piece = min(PIECE_BYTES[work.device], as_float32)
    hidden = work.batch * chunk_tokens * (dit.ffn_dim + dit.dim) * work.element_bytes
    tokens_fp8, widened = 0, 0
    if work.multiplies_fp8:
        tokens_fp8 = stream // work.element_bytes  # a byte each, of what is multiplied
        hidden += work.batch * chunk_tokens * dit.ffn_dim
        widened = dit.dim**2 * work.element_bytes  # cross-attention does not multiply in fp8
    copies_of_head = 2 if work.element_bytes < FLOAT32 else 1  # the stream widened, and its norm
    return {
        "attention": 5 * stream + tokens_fp8,  # x, q, k, v, what attention gives; or x, its norm, q, k, v
        "norms of q and k": 4 * stream + 3 * piece,  # x, its norm, q, k; a piece, normalised, scaled
        "gated sums": 2 * stream + 3 * piece,
        "cross-attention": (5 if work.image_tokens else 4) * stream + widened,
        "feed-forward": 2 * stream + hidden,
        "head": stream + copies_of_head * as_float32 + (2 * piece if work.batch > 1 else 0),
    }


def _lasting(dit: DiTSizes, work: Workload, tokens: int) -> int:
    """Bytes that stay from step to step: latents, velocities, planes, rotations, embedded text and image."""
    positions = work.batch * tokens * dit.patch_size[0] * dit.patch_size[1] * dit.patch_size[2]
    latents = (LATENT_COPIES + work.num_branches) * positions * dit.out_dim * FLOAT32
    planes = work.num_branches * positions * (dit.in_dim - dit.out_dim) * work.element_bytes
    rotations = tokens * (dit.dim // dit.num_heads) * FLOAT32
    context = work.num_branches * work.batch * work.context_tokens * dit.dim * work.element_bytes
    return latents + planes + rotations + context + key_bytes(dit, work, num_blocks=1)


def key_bytes(dit: DiTSizes, work: Workload, *, num_blocks: int) -> int:
    """Keys and values of cross-attention, of all sides of the guidance."""
    row = 2 * dit.dim * work.element_bytes
    return num_blocks * work.num_branches * work.batch * work.context_tokens * row


def text_activations(layers: Sequence[LayerSpec], work: Workload) -> int:
    """Bytes while one prompt is encoded: the widest layer, and scores' bias with its copy in mask form."""
    counts = {layer.name: layer.num_parameters for layer in layers}
    dim = counts.get("norm.weight", 0)
    if not dim:
        return 0
    hidden = counts.get("blocks.0.ffn.fc1.weight", 0) // dim
    num_heads = counts.get("blocks.0.pos_embedding.embedding.weight", 0) // 32  # buckets
    row = max(3 * dim * FLOAT32, (3 * dim + 4 * hidden) * work.element_bytes)
    return work.text_tokens * row + 2 * num_heads * work.text_tokens**2 * work.element_bytes


def image_activations(layers: Sequence[LayerSpec], work: Workload) -> int:
    """Bytes while one picture is encoded: 257 tokens, a hidden layer four times as wide, q, k, v."""
    counts = {layer.name: layer.num_parameters for layer in layers}
    return 257 * counts.get("visual.cls_embedding", 0) * 12 * FLOAT32


def vae_activations(layers: Sequence[LayerSpec], work: Workload, *, tiled: bool) -> int:
    """Bytes at the fullest moment of a decode, one latent frame at a time.

    The whole picture leaves the device chunk by chunk; tiles are added up there, in a video of float32.
    """
    stride = _spatial_stride(layers)
    rows, columns = -(-work.height // stride), -(-work.width // stride)
    if not tiled:
        return _chunk_bytes(layers, work, rows, columns)
    sums = (3 * work.num_frames + 1) * rows * columns * stride**2 * FLOAT32
    return sums + _chunk_bytes(layers, work, min(rows, TILE[0]), min(columns, TILE[1]))


def vae_encode_activations(layers: Sequence[LayerSpec], work: Workload, *, tiled: bool) -> int:
    """Bytes at the fullest moment of an encode, four frames at a time; 0 for a VAE that only decodes.

    Frames come chunk by chunk, from the host; latents stay, and tiles are added up in float32.
    """
    if not _units(layers, "encoder"):
        return 0
    stride = _spatial_stride(layers)
    rows, columns = -(-work.height // stride), -(-work.width // stride)
    latents = _count(layers, "conv2.bias") * work.latent_frames * rows * columns * FLOAT32
    if not tiled:
        return latents + _encode_chunk_bytes(layers, work, rows, columns)
    tile = _encode_chunk_bytes(layers, work, min(rows, TILE[0]), min(columns, TILE[1]))
    return latents + rows * columns * FLOAT32 + tile


PATCH = 2  # of vae22.py: pixels along an edge of what the Wan2.2 VAE codes as one
_UNIT = re.compile(r"(encoder|decoder)\.(\w+samples\.\d+(?:\.\w+samples\.\d+)?)\.(residual|resample)\.")


def _units(layers: Sequence[LayerSpec], coder: str = "decoder") -> list[tuple[str, str]]:
    """Residual blocks and resamplings of a coder in order of use: (name, "residual" or "resample")."""
    matches = (_UNIT.match(layer.name) for layer in layers)
    found = {(m.group(2), m.group(3)) for m in matches if m and m.group(1) == coder}
    return sorted(found, key=lambda unit: [int(part) for part in re.findall(r"\d+", unit[0])])


def _count(layers: Sequence[LayerSpec], name: str) -> int:
    """Parameters of one tensor; 0 where there is none of this name."""
    return next((layer.num_parameters for layer in layers if layer.name == name), 0)


def _stage(unit: str) -> str | None:
    """The stage around a unit of the Wan2.2 VAE, which holds its input to the end; None in one flat list."""
    parts = unit.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else None


def _patch(layers: Sequence[LayerSpec]) -> int:
    """Pixels along an edge of what leaves the last convolution as one position."""
    return PATCH if any(_stage(name) for name, _ in _units(layers)) else 1


def _spatial_stride(layers: Sequence[LayerSpec]) -> int:
    """Pixels along an edge of a latent position: a doubling each, and the patch."""
    return _patch(layers) << sum(kind == "resample" for _, kind in _units(layers))


def _chunk_bytes(layers: Sequence[LayerSpec], work: Workload, rows: int, columns: int) -> int:
    """Bytes while one latent frame of ``rows`` x ``columns`` is decoded, histories of all layers included.

    A residual block is fullest in its second convolution: its input, a window of this chunk and two past
    frames, the result; or in its first, where it narrows: input and window are wider than the rest; or, on a
    GPU, in a norm, whose result is there before it goes into the window. Stages of the Wan2.2 VAE hold their
    input beside it, for the shortcut; the last stage, which has none, does not.
    """
    counts = {layer.name.removeprefix("decoder."): layer.num_parameters for layer in layers}
    is_clip = work.num_frames > 1
    kept = (
        2 if is_clip else 1
    )  # frames that a convolution remembers; before a picture there is nothing to join
    frames, positions, peak = 1, rows * columns, 0
    channels = counts.get("middle.0.residual.0.gamma", 0)
    history = 4 * kept * channels * positions  # four convolutions of the middle
    stage, entered = None, 0
    with_shortcut = {_stage(name) for name, kind in _units(layers) if kind == "resample"} - {None}
    for name, kind in _units(layers):
        beside = entered  # by its first block the stage's input is held anyway
        if _stage(name) != stage:
            stage = _stage(name)
            beside, entered = 0, frames * channels * positions if stage in with_shortcut else 0
        if kind == "residual":
            received, channels = (counts.get(f"{name}.residual.{i}.gamma", 0) for i in (0, 3))
            history += kept * (received + channels) * positions
            peak = max(peak, _residual_values(work, frames, received, channels) * positions + beside)
            continue
        if f"{name}.time_conv.weight" in counts and is_clip:
            history += 2 * channels * positions
            frames *= 2
        given = counts.get(f"{name}.resample.1.bias", 0)
        # the small picture, four kinds of output pixel, the picture that they make
        peak = max(peak, frames * (channels + 8 * given) * positions + beside)
        positions, channels = 4 * positions, given
    history += kept * channels * positions
    pixels = positions * _patch(layers) ** 2
    pictures = 2 * frames * 3 * pixels * FLOAT32  # the chunk in float32, and on its way
    return (history + peak) * _value_bytes(layers, work) + pictures


def _encode_chunk_bytes(layers: Sequence[LayerSpec], work: Workload, rows: int, columns: int) -> int:
    """Bytes while four frames of ``rows`` x ``columns`` positions are encoded, all histories included.

    A residual block is fullest where one of a decoder is. A halving holds its input, a copy with a border,
    and the result. Every stage of the Wan2.2 VAE holds its input to the end, where its shortcut holds two
    copies of that and the means beside what they are added to. The chunk itself is held all the while, twice
    where it is cut into patches. A picture is its own first chunk: layers ahead remember nothing yet.
    """
    counts = {layer.name.removeprefix("encoder."): layer.num_parameters for layer in layers}
    channels = _count(layers, "encoder.conv1.bias")
    colours = _count(layers, "encoder.conv1.weight") // (27 * channels)
    is_clip = work.num_frames > 1
    kept, frames = (2, TEMPORAL_STRIDE) if is_clip else (1, 1)
    units = _units(layers, "encoder")
    is_staged = _stage(units[0][0]) is not None
    positions = rows * columns << 2 * sum(kind == "resample" for _, kind in units)
    pixels = (2 if is_staged else 1) * frames * colours * positions
    history, peak, stage, entered = kept * colours * positions, 0, None, 0
    for name, kind in units:
        beside = entered  # by its first block the stage's input is held anyway
        if _stage(name) != stage:
            stage, beside, entered = _stage(name), 0, frames * channels * positions
        if kind == "residual":
            received, channels = (counts.get(f"{name}.residual.{i}.gamma", 0) for i in (0, 3))
            history += kept * (received + channels) * positions
            values = _residual_values(work, frames, received, channels) * positions + beside
        else:
            values = (2 * positions + positions // 4) * frames * channels + beside
            positions //= 4
            if f"{name}.time_conv.weight" in counts and is_clip:
                history += channels * positions
                frames //= 2
            if is_staged:
                values = max(values, 3 * entered + 2 * frames * channels * positions)
        peak = max(peak, values + (0 if is_clip else history))
    history += 5 * kept * channels * positions  # four convolutions of the middle, and the head's
    if not is_clip:
        # In attention: input, q, k, v, what it gives, that joined, projected, and the sum.
        values = 8 * channels * positions
        return (max(peak, values + history) + pixels) * _value_bytes(layers, work)
    return (peak + history + pixels) * _value_bytes(layers, work)


def _residual_values(work: Workload, frames: int, received: int, channels: int) -> int:
    """Values by position at the fullest moment of a residual block; see `_chunk_bytes`."""
    window = frames + (2 if work.num_frames > 1 else 0)
    first = (frames + window) * received + frames * channels
    second = frames * received + (window + frames) * channels
    norms = frames * max(3 * received, received + 3 * channels) if work.device == "cuda" else 0
    return max(first, second, norms)


def _value_bytes(layers: Sequence[LayerSpec], work: Workload) -> int:
    dtype = next((layer.dtype for layer in layers if layer.name == "conv1.weight"), work.compute_dtype)
    return DTYPE_BYTES[dtype]

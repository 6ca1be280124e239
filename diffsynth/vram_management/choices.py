"""Which blocks of the DiTs stay, how many slots the others share, and what else is worth its memory.

The lean way comes first: two slots, one side of the guidance at a time, no keys kept. Whatever costs memory
must make the step faster, and only a step that waits for copies can become faster by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from diffsynth.vram_management.activations import WORKSPACE_BYTES, Workload, dit_activations, key_bytes
from diffsynth.vram_management.layers import BlockSize, NetworkSize
from diffsynth.vram_management.rates import DiTSizes, Rates, block_flops

DITS = ("dit", "dit_low_noise")
ENCODERS = {
    "text_encoder": "text",
    "image_encoder": "image",
    "audio_encoder": "audio",
    "vae": "vae",
}  # phases
ENCODE = "encode"  # the VAE's other phase, where pictures are given
LOW_NOISE = "_low_noise"  # ends the names of the second of two experts and its adapters
SMALL_CHUNK_TOKENS = 1024  # of the feed-forward, where its default does not fit
WORTH = 0.98  # of a step's time: what saves less is not worth memory
NEAR_BALANCE = (0.8, 1.25)  # copies to compute, where a third slot evens out what each waits for the other


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All that a choice depends on."""

    sizes: Mapping[str, NetworkSize]
    dit: DiTSizes
    work: Workload
    rates: Rates
    room_bytes: float  # of the device; infinite without a limit
    num_persistent: int | None  # DiT parameters that are to stay
    ringed: frozenset[str] = frozenset()  # networks whose blocks come through the ring

    def phases(self) -> dict[str, tuple[str, ...]]:
        """Networks of each DiT's phase, the DiT first; an adapter without a twin serves both experts."""
        adapters = [name for name in self.sizes if name not in (*DITS, *ENCODERS)]
        found = {}
        for dit in DITS:
            if dit in self.sizes:
                suffix = dit.removeprefix("dit")
                own = [a for a in adapters if a.endswith("_low_noise") == bool(suffix)]
                shared = [a for a in adapters if suffix and a not in own and a + suffix not in adapters]
                found[dit] = (dit, *own, *shared)
        return found

    def twin(self, name: str) -> str | None:
        """The network of the other expert that has the same place, or None."""
        other = name.removesuffix(LOW_NOISE) if name.endswith(LOW_NOISE) else name + LOW_NOISE
        return other if other in self.sizes and all(dit in self.sizes for dit in DITS) else None

    def tokens(self, names: tuple[str, ...]) -> int:
        """Of the video, and of the frame that a reference picture adds."""
        frames, rows, columns = self.work.grid(self.dit)
        has_reference = any(name.startswith("reference") for name in names)
        return (frames + has_reference) * rows * columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How the DiTs run, and what it costs."""

    interleaves: bool = False
    keeps_keys: bool = False
    num_slots: int = 2
    ffn_chunk_tokens: int | None = None
    residents: Mapping[str, int] = field(default_factory=dict)  # blocks that stay, by network
    copy_s: float = 0.0  # per step
    compute_s: float = 0.0

    def streams(self, size: NetworkSize) -> bool:
        """Whether some of its blocks travel."""
        return self.residents.get(size.name, len(size.blocks)) < len(size.blocks)

    def travelling(self, size: NetworkSize) -> tuple[BlockSize, ...]:
        """The blocks of a network that do not stay."""
        num_blocks = len(size.blocks)
        staying = set(spread(num_blocks, self.residents.get(size.name, num_blocks)))
        return tuple(block for index, block in enumerate(size.blocks) if index not in staying)

    @property
    def step_s(self) -> float:
        """Copies and compute run side by side."""
        return max(self.copy_s, self.compute_s)


def activation_bytes(scene: Scene, names: tuple[str, ...], way: Way) -> int:
    """Of one DiT's phase, with a matrix that is widened from fp8 (of products in fp8 a block knows)."""
    num_vace_blocks = sum(len(scene.sizes[n].blocks) for n in names if n.startswith("vace"))
    device = scene.work.device
    widened = max(scene.sizes[name].widened_parameters(device) for name in names)
    widened = 0 if scene.work.multiplies_fp8 else widened
    return widened * scene.work.element_bytes + dit_activations(
        scene.dit, scene.work, tokens=scene.tokens(names), interleaves=way.interleaves,
        ffn_chunk_tokens=way.ffn_chunk_tokens, num_vace_blocks=num_vace_blocks,
    )  # fmt: skip


def kept_key_bytes(scene: Scene, names: tuple[str, ...], way: Way) -> int:
    """Of all blocks of one DiT, beyond those of one block, which are always there."""
    if not way.keeps_keys:
        return 0
    num_blocks = sum(len(scene.sizes[n].blocks) for n in names if n == names[0] or n.startswith("vace"))
    return key_bytes(scene.dit, scene.work, num_blocks=num_blocks - 1)


def coming_bytes(scene: Scene, names: tuple[str, ...], way: Way) -> int:
    """What the later of two experts sends ahead into the phase of the earlier: all that is in no block."""
    if names[0] != DITS[0] or not way.streams(scene.sizes[DITS[0]]):
        return 0
    coming = [scene.sizes[twin] for name in names if (twin := scene.twin(name)) is not None]
    return sum(size.rest_bytes - size.table_bytes for size in coming)


def slots_bytes(size: NetworkSize, way: Way) -> int:
    """Of a network's copy slots: each holds any block that travels."""
    travelling = way.travelling(size)
    largest = max((block.slot_bytes for block in travelling), default=0)
    return min(way.num_slots, len(travelling)) * largest


def weight_bytes(size: NetworkSize, way: Way) -> int:
    """Of a network's weights on the device in its phase, without slots."""
    if not way.streams(size):
        return size.num_bytes
    travelling = sum(block.num_bytes for block in way.travelling(size))
    return size.num_bytes - size.table_bytes - travelling


def spread(num_blocks: int, num_resident: int) -> tuple[int, ...]:
    """Choose blocks evenly through the depth, so that copies of the others find compute to hide behind.

    The middle of each of ``num_resident`` equal parts; the first block travels if any does.
    """
    return tuple((2 * i + 1) * num_blocks // (2 * num_resident) for i in range(num_resident))


def phase_bytes(scene: Scene, names: tuple[str, ...], way: Way) -> int:
    """Peak of one DiT's phase."""
    weights = sum(weight_bytes(scene.sizes[n], way) + slots_bytes(scene.sizes[n], way) for n in names)
    activations = activation_bytes(scene, names, way) + kept_key_bytes(scene, names, way)
    weights += coming_bytes(scene, names, way)
    return weights + activations + WORKSPACE_BYTES[scene.work.device]


def leanest(scene: Scene) -> Way:
    """The way that takes least memory, with the blocks that the caller wants to stay."""
    way = Way(ffn_chunk_tokens=None if scene.work.device == "cpu" else SMALL_CHUNK_TOKENS)
    residents: dict[str, int] = {}
    for names in scene.phases().values():
        for name in names:
            if scene.sizes[name].blocks:
                residents[name] = _wished(scene, name) or 0
    return replace(way, residents=residents)


def choose(scene: Scene) -> Way | None:
    """Return the fastest way that fits, the leanest among equals; None when none fits."""
    whole = _fitting(scene, Way(keeps_keys=True))
    if whole is not None and not _streams_any(scene, whole):
        return whole
    chunks = (None,) if scene.work.device == "cpu" else (None, SMALL_CHUNK_TOKENS)
    lean = next(
        (way for chunk in chunks if (way := _fitting(scene, Way(ffn_chunk_tokens=chunk))) is not None), None
    )
    if lean is None or not _streams_any(scene, lean):
        return lean
    best = lean
    for interleaves, keeps_keys in ((False, True), (True, False), (True, True)):
        if best.copy_s <= best.compute_s:
            break
        other = _fitting(scene, replace(lean, interleaves=interleaves, keeps_keys=keeps_keys))
        if other is not None and other.step_s < WORTH * best.step_s:
            best = other
    return _with_third_slot(scene, best)


def _with_third_slot(scene: Scene, way: Way) -> Way:
    """Add a slot where copies and compute take about as long; elsewhere one waits for the other anyway."""
    if not NEAR_BALANCE[0] <= way.copy_s / way.compute_s <= NEAR_BALANCE[1]:
        return way
    more = _fitting(scene, replace(way, num_slots=3))
    if more is None or not _streams_any(scene, more) or WORTH * more.step_s > way.step_s:
        return way
    return more


def _streams_any(scene: Scene, way: Way) -> bool:
    return any(way.streams(scene.sizes[n]) for names in scene.phases().values() for n in names)


def _wished(scene: Scene, name: str) -> int | None:
    """Blocks that ``num_persistent`` leaves on the device; None: as many as fit."""
    if scene.num_persistent is None:
        return None
    if name not in DITS:
        return 0
    size = scene.sizes[name]
    inside = size.num_parameters - size.rest_parameters
    share = max(0, scene.num_persistent - size.rest_parameters) / max(1, inside)
    return min(len(size.blocks), math.floor(share * len(size.blocks) + 1e-9))


def _fitting(scene: Scene, way: Way) -> Way | None:
    """This way, with as many blocks resident as fit in every phase; None when it does not fit."""
    residents: dict[str, int] = {}
    for names in scene.phases().values():
        found = _residents(scene, names, way)
        if found is None:
            return None
        for name, count in found.items():
            twin = scene.twin(name) or name  # who takes over has the same blocks in the same places
            residents[name] = min(count, residents.get(name, count), residents.get(twin, count))
            if twin in residents:
                residents[twin] = residents[name]
    return _timed(scene, replace(way, residents=residents))


def _residents(scene: Scene, names: tuple[str, ...], way: Way) -> dict[str, int] | None:
    streamable = [name for name in names if scene.sizes[name].blocks]
    if scene.num_persistent is None:
        if phase_bytes(scene, names, replace(way, residents={})) <= scene.room_bytes:
            return {name: len(scene.sizes[name].blocks) for name in streamable}
        counts = dict.fromkeys(streamable, 0)
    else:
        counts = {name: _wished(scene, name) or 0 for name in streamable}
    left = scene.room_bytes - phase_bytes(scene, names, replace(way, residents=counts))
    if left < 0:
        return None
    if scene.num_persistent is not None:
        return counts
    for name in streamable:
        counts[name], used = _most(scene.sizes[name], way, left)
        left -= used
    return counts


def _most(size: NetworkSize, way: Way, room_bytes: float) -> tuple[int, int]:
    """Blocks that may stay within some room beyond that of none, and what they take of it."""

    def taken(count: int) -> int:
        with_count = replace(way, residents={size.name: count})
        return weight_bytes(size, with_count) + slots_bytes(size, with_count)

    none = taken(0)
    # What the slots hold anyway needs no streaming: the last blocks stay all together or not at all.
    for count in range(len(size.blocks) - way.num_slots - 1, 0, -1):
        used = taken(count) - none
        if used <= room_bytes:
            return count, used
    return 0, 0


def _timed(scene: Scene, way: Way) -> Way:
    """Fill in the seconds of a step, of the slower expert."""
    copy_s = compute_s = 0.0
    for names in scene.phases().values():
        num_blocks = sum(len(scene.sizes[name].blocks) for name in names)
        flops = block_flops(
            scene.dit, tokens=scene.tokens(names), context_tokens=scene.work.context_tokens,
            keeps_keys=way.keeps_keys,
        )  # fmt: skip
        operations = num_blocks * flops * scene.work.batch * scene.work.num_branches
        compute_s = max(compute_s, operations / (scene.rates.tflops * 1e12))
        copy_s = max(copy_s, sum(_copy_s(scene, scene.sizes[name], way) for name in names))
    return replace(way, copy_s=copy_s, compute_s=compute_s)


def _copy_s(scene: Scene, size: NetworkSize, way: Way) -> float:
    passes = 1 if way.interleaves else scene.work.num_branches
    rate = scene.rates.ring_gbs if size.name in scene.ringed else scene.rates.copy_gbs
    return passes * pass_bytes(size, way) / (rate * 1e9)


def pass_bytes(size: NetworkSize, way: Way) -> int:
    """What travels each time the blocks are walked through, once the keys are kept if they are."""
    keeps_keys = way.keeps_keys and size.name in DITS
    return sum(block.slot_bytes - (block.key_bytes if keeps_keys else 0) for block in way.travelling(size))

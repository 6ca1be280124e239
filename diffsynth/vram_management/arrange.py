"""From a request to a plan: phases, who stays between them, where weights rest on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffsynth.errors import MemoryBudgetError
from diffsynth.vram_management.activations import (
    WORKSPACE_BYTES,
    Workload,
    image_activations,
    text_activations,
    vae_activations,
    vae_encode_activations,
)
from diffsynth.vram_management.choices import (
    DITS,
    ENCODE,
    ENCODERS,
    LOW_NOISE,
    Scene,
    Way,
    activation_bytes,
    choose,
    coming_bytes,
    kept_key_bytes,
    leanest,
    pass_bytes,
    phase_bytes,
    slots_bytes,
    spread,
    weight_bytes,
)
from diffsynth.vram_management.layers import GIB, LayerSpec, NetworkSize
from diffsynth.vram_management.memory_plan import Host, MemoryPlan, NetworkPlan, PhasePlan, Verdict
from diffsynth.vram_management.rates import DiTSizes, Rates

DEVICE_RESERVE_BYTES = {"cpu": 0, "cuda": 500_000_000}  # CUDA's context and what the allocator cannot use
HOST_RESERVE_BYTES = {"cpu": 0, "cuda": 2_000_000_000}  # Python, torch, CUDA's libraries, the frames
RING_BUFFERS = 2  # each holds the largest block


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What the caller gave."""

    layers: tuple[LayerSpec, ...]
    sizes: Mapping[str, NetworkSize]
    dit: DiTSizes | None
    work: Workload
    rates: Rates
    vram_limit_gib: float | None
    ram_limit_gib: float | None
    num_persistent: int | None
    encodes: bool = False  # the VAE codes pictures before it decodes

    @property
    def room_bytes(self) -> float:
        """Of the device, for what torch allocates."""
        if self.vram_limit_gib is None:
            return math.inf
        return self.vram_limit_gib * GIB - DEVICE_RESERVE_BYTES[self.work.device]

    @property
    def host_room_bytes(self) -> float:
        """Of the host, for weights."""
        if self.ram_limit_gib is None:
            return math.inf
        return self.ram_limit_gib * GIB - HOST_RESERVE_BYTES[self.work.device]

    @property
    def may_lock(self) -> bool:
        """Whether networks that come as a whole may rest in pinned memory: a limit counts streams alone."""
        return self.work.device == "cuda" and self.ram_limit_gib is None

    @property
    def is_free(self) -> bool:
        """Nothing is limited: every network then comes for its phase."""
        return (self.vram_limit_gib, self.ram_limit_gib, self.num_persistent) == (None, None, None)

    def scene(self, ringed: frozenset[str] = frozenset()) -> Scene | None:
        """What choices about the DiTs depend on; None without a DiT."""
        if self.dit is None or not any(name in self.sizes for name in DITS):
            return None
        return Scene(
            sizes=self.sizes, dit=self.dit, work=self.work, rates=self.rates, room_bytes=self.room_bytes,
            num_persistent=self.num_persistent, ringed=ringed,
        )  # fmt: skip

    def encoder_phase(self, name: str, *, streamed: bool = False, tiled: bool = False) -> PhasePlan:
        """The phase of a network that is no DiT."""
        size, own = self.sizes[name], [layer for layer in self.layers if layer.network == name]
        way = Way(residents={name: 0} if streamed else {})
        activations = 0
        if name == "text_encoder":
            activations = text_activations(own, self.work)
        elif name == "image_encoder":
            activations = image_activations(own, self.work)
        elif name == "vae":
            activations = vae_activations(own, self.work, tiled=tiled)
        return PhasePlan(
            name=ENCODERS[name], networks=(name,), weight_bytes=weight_bytes(size, way), key_bytes=0,
            slot_bytes=slots_bytes(size, way), activation_bytes=activations,
            workspace_bytes=WORKSPACE_BYTES[self.work.device],
        )  # fmt: skip

    def encode_phase(self, *, tiled: bool = False) -> PhasePlan:
        """The phase in which the VAE codes what was given."""
        own = [layer for layer in self.layers if layer.network == "vae"]
        activations = vae_encode_activations(own, self.work, tiled=tiled)
        return replace(self.encoder_phase("vae"), name=ENCODE, activation_bytes=activations)

    def check_device(self) -> None:
        """Refuse a limit that the leanest plan does not hold."""
        minima: dict[str, int] = {}
        scene = self.scene()
        if scene is not None:
            minima = {dit: phase_bytes(scene, names, leanest(scene)) for dit, names in scene.phases().items()}
        for name in ENCODERS:
            if name in self.sizes:
                lean = self.encoder_phase(name, streamed=bool(self.sizes[name].blocks), tiled=True)
                minima[lean.name] = min(lean.peak_bytes, self.encoder_phase(name).peak_bytes)
        if self.encodes:
            minima[ENCODE] = min(self.encode_phase(tiled=tiled).peak_bytes for tiled in (False, True))
        if not minima or max(minima.values()) <= self.room_bytes:
            return
        assert self.vram_limit_gib is not None
        phase_name = max(minima, key=lambda name: minima[name])
        minimum = minima[phase_name] + DEVICE_RESERVE_BYTES[self.work.device]
        raise MemoryBudgetError(
            "vram_limit", self.vram_limit_gib, math.ceil(minimum / GIB * 100) / 100,
            f"phase {phase_name!r}", self._remedy(phase_name),
        )  # fmt: skip

    def _remedy(self, phase: str) -> str:
        is_8_bit = any(size.fp8_parameters for size in self.sizes.values())
        fp8 = "" if is_8_bit else ", or load with torch_dtype=torch.float8_e4m3fn (--dtype fp8)"
        size = f"{self.work.height} x {self.work.width}, {self.work.num_frames} frames"
        if phase in (ENCODE, "vae"):
            return f"Raise it, or ask for a smaller picture or fewer frames than {size}."
        if phase not in DITS:
            network = next(name for name, its_phase in ENCODERS.items() if its_phase == phase)
            return f"Raise it, or leave {network} out of this run{fp8 if phase == 'text' else ''}."
        fewer = ", or lower num_persistent_param_in_dit" if self.num_persistent else ""
        return f"Raise it, ask for a smaller picture or fewer frames than {size}{fp8}{fewer}."

    def host_error(self, needed_bytes: int) -> MemoryBudgetError:
        """A limit of the host that even the ring does not hold."""
        assert self.ram_limit_gib is not None
        minimum = needed_bytes + HOST_RESERVE_BYTES[self.work.device]
        converted = sum(size.unmapped_bytes for size in self.sizes.values())
        how = (
            "Use files that already have the dtype you compute in: weights that are converted at load rest "
            "in plain memory."
            if converted
            else "Raise it: the ring itself takes this much."
        )
        return MemoryBudgetError(
            "ram_limit", self.ram_limit_gib, math.ceil(minimum / GIB * 100) / 100, "the host's weights", how
        )


class Arrangement:
    """One way to arrange everything, with these networks read through the ring."""

    def __init__(self, request: PlanRequest, ringed: frozenset[str]) -> None:
        self._request, self._ringed = request, ringed
        self._scene = request.scene(ringed)
        way = Way() if self._scene is None else choose(self._scene)
        assert way is not None, "the minimum was checked before"
        self._way = way

    def plan(self) -> MemoryPlan:
        """Put it all together."""
        request, way = self._request, self._way
        phases, streamed, tiled = self._phases()
        tiled_encode = ENCODE in tiled if request.encodes else "vae" in tiled
        staying = self._staying(phases, streamed)
        if "text_encoder" in request.sizes and not streamed:
            # A streamed text encoder costs nothing more and may leave room for a DiT to stay.
            others, also_streamed, _ = self._phases(streams_text=True)
            stay_then = self._staying(others, also_streamed)
            if set(DITS) & (stay_then - staying):
                phases, streamed, staying = others, also_streamed, stay_then
        networks = {name: self._network(name, streamed, staying) for name in request.sizes}
        if not any(networks[name].where == "streamed" for name in DITS if name in networks):
            verdict: Verdict = "resident"
        else:
            verdict = "compute-bound" if way.copy_s <= way.compute_s else "copy-bound"
        return MemoryPlan(
            networks=networks,
            phases=tuple(self._filled(phase, networks, staying) for phase in phases),
            interleaves_branches=way.interleaves, keeps_keys=way.keeps_keys,
            ffn_chunk_tokens=way.ffn_chunk_tokens, tiled_vae="vae" in tiled, copy_s=way.copy_s,
            compute_s=way.compute_s, verdict=verdict, tiled_encode=tiled_encode,
            reserve_bytes=DEVICE_RESERVE_BYTES[request.work.device],
            notes=self._notes(networks, tiled),
        )  # fmt: skip

    def _phases(self, *, streams_text: bool = False) -> tuple[list[PhasePlan], set[str], set[str]]:
        """Every phase in order, the encoders that are streamed, and the phases in which the VAE tiles."""
        request, scene, way = self._request, self._scene, self._way
        dits: list[PhasePlan] = []
        for dit, names in () if scene is None else scene.phases().items():
            assert scene is not None
            dits.append(
                PhasePlan(
                    name=dit, networks=names, key_bytes=kept_key_bytes(scene, names, way),
                    weight_bytes=sum(weight_bytes(request.sizes[name], way) for name in names)
                    + coming_bytes(scene, names, way),
                    slot_bytes=sum(slots_bytes(request.sizes[name], way) for name in names),
                    activation_bytes=activation_bytes(scene, names, way),
                    workspace_bytes=WORKSPACE_BYTES[request.work.device],
                )
            )  # fmt: skip
        # Whoever says how many DiT parameters stay wants a small peak: encoders are held to that of the DiT.
        is_free = request.vram_limit_gib is None and request.num_persistent is not None
        room = max(phase.peak_bytes for phase in dits) if is_free else request.room_bytes
        before, after, streamed, tiled = list[PhasePlan](), list[PhasePlan](), set[str](), set[str]()
        for name in (name for name in ENCODERS if name in request.sizes):
            phase = request.encoder_phase(name)
            if name == "vae":
                coded = [(after, phase, request.encoder_phase(name, tiled=True))]
                if request.encodes:
                    coded.append((before, request.encode_phase(), request.encode_phase(tiled=True)))
                for place, whole, in_tiles in coded:
                    is_tiled = request.room_bytes < whole.peak_bytes > in_tiles.peak_bytes
                    tiled |= {whole.name} if is_tiled else set()
                    place.append(in_tiles if is_tiled else whole)
                continue
            if request.sizes[name].blocks and (streams_text or phase.peak_bytes > room):
                streamed.add(name)
                phase = request.encoder_phase(name, streamed=True)
            before.append(phase)
        return [*before, *dits, *after], streamed, tiled

    def _staying(self, phases: list[PhasePlan], streamed: set[str]) -> set[str]:
        """Networks that stay on the device through all phases: the largest first, while all phases fit."""
        request, staying = self._request, set[str]()
        if request.num_persistent is not None:
            return staying
        whole = [n for n, size in request.sizes.items() if n not in streamed and not self._way.streams(size)]
        for name in sorted(whole, key=lambda name: -request.sizes[name].num_bytes):
            tried = staying | {name}
            peaks = [phase.peak_bytes + self._guests_bytes(phase, tried) for phase in phases]
            if max(peaks) <= request.room_bytes:
                staying = tried
        return staying

    def _guests_bytes(self, phase: PhasePlan, staying: set[str]) -> int:
        """Weights that stay though this phase does not use them."""
        return sum(self._request.sizes[name].num_bytes for name in staying - set(phase.networks))

    def _filled(self, phase: PhasePlan, networks: Mapping[str, NetworkPlan], staying: set[str]) -> PhasePlan:
        own = [networks[name] for name in phase.networks]
        return replace(
            phase, weight_bytes=phase.weight_bytes + self._guests_bytes(phase, staying),
            pinned_bytes=sum(network.pinned_bytes for network in own),
            pageable_bytes=sum(network.pageable_bytes for network in own),
            mapped_bytes=sum(network.mapped_bytes for network in own),
        )  # fmt: skip

    def _network(self, name: str, streamed: set[str], staying: set[str]) -> NetworkPlan:
        size, way = self._request.sizes[name], self._way
        if name in ENCODERS:
            way = Way(residents={name: 0} if name in streamed else {})
        plain = NetworkPlan(
            network=name, where="resident" if name in staying else "visits", num_blocks=len(size.blocks),
            num_parameters=size.num_parameters, weight_bytes=size.num_bytes, device_bytes=size.num_bytes,
            pageable_bytes=size.unmapped_bytes, mapped_bytes=size.num_bytes - size.unmapped_bytes,
        )  # fmt: skip
        is_of_pair, may_lock = self._is_of_pair(name), self._request.may_lock
        # What is sent ahead arrives from where it lies: the later one of a pair is never locked.
        may_lock = may_lock and not (is_of_pair and name.endswith(LOW_NOISE))
        if not way.streams(size):
            comes_again = may_lock and (plain.where == "visits" or self._request.is_free)
            return replace(
                plain, is_of_pair=is_of_pair and not size.blocks,
                locked_bytes=size.num_bytes if comes_again else 0,
            )  # fmt: skip
        # Blocks of a pair all travel, be it once: the later expert's take the places of the earlier one's.
        travelling = size.blocks if is_of_pair else way.travelling(size)
        host: Host = "pageable" if self._request.work.device == "cpu" else "pinned"
        held = sum(block.slot_bytes for block in travelling)
        if name in self._ringed:
            host, held = "ring", RING_BUFFERS * max(block.slot_bytes for block in travelling)
            if is_of_pair and name.endswith(LOW_NOISE):
                held = 0  # it reads through the ring of the other expert
        outside = size.num_bytes
        if host != "ring":
            outside -= sum(block.num_bytes for block in travelling)
        pageable = min(size.unmapped_bytes, outside)
        return replace(
            plain, where="streamed", num_slots=way.num_slots, host=host, is_of_pair=is_of_pair,
            resident_blocks=spread(len(size.blocks), way.residents[name]),
            device_bytes=weight_bytes(size, way) + slots_bytes(size, way),
            streamed_bytes=pass_bytes(size, way), pinned_bytes=0 if host == "pageable" else held,
            pageable_bytes=pageable + (held if host == "pageable" else 0), mapped_bytes=outside - pageable,
            locked_bytes=size.rest_bytes - size.table_bytes if may_lock else 0,
        )  # fmt: skip

    def _is_of_pair(self, name: str) -> bool:
        """Whether its expert is streamed, and the other one has its like."""
        scene, way = self._scene, self._way
        if scene is None or name in ENCODERS or scene.twin(name) is None:
            return False
        return all(way.streams(scene.sizes[dit]) for dit in DITS)

    def _notes(self, networks: Mapping[str, NetworkPlan], tiled: set[str]) -> tuple[str, ...]:
        way, notes = self._way, []
        if any(networks[name].is_of_pair for name in DITS if name in networks):
            where = {"pinned": "in pinned memory", "ring": "in their files, read through one pinned ring"}
            place = where.get(networks[DITS[1]].host, "in plain memory")
            notes.append(f"Both experts rest {place}: the low-noise one sets out before the other has ended.")
        ring = [name for name, network in networks.items() if network.host == "ring"]
        if ring:
            notes.append(
                f"ram_limit does not hold {', '.join(ring)} in pinned memory: blocks are read from the file "
                f"through a pinned ring of {RING_BUFFERS} buffers, at {self._request.rates.ring_gbs:g} GB/s."
            )
        for phase, work in ((ENCODE, "encode"), ("vae", "decode")):
            if phase in tiled:
                notes.append(f"The whole picture does not fit the VAE's {work}: it works in tiles.")
        if way.ffn_chunk_tokens is not None:
            notes.append(f"Feed-forward layers take {way.ffn_chunk_tokens} tokens at a time to fit.")
        if way.interleaves:
            notes.append("Each block serves both sides of the guidance while it is there: half the copies.")
        if way.keeps_keys and way.copy_s:
            notes.append("Keys of text and image are kept: their layers travel in the first step only.")
        if way.num_slots > 2:
            notes.append("Copies and compute take about as long: a third slot evens them out.")
        uncounted = [n for n in networks if n.startswith(("speech", "animate", "audio"))]
        if uncounted:
            notes.append(f"What {', '.join(uncounted)} computes beside its weights is not counted.")
        return tuple(notes)

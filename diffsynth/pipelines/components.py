"""The parts of a pipeline, found in a ModelManager and checked to belong together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.checkpoints.hints import Role, is_of_no_pair, tells_few_steps
from diffsynth.checkpoints.pairs import is_dit, is_named, roles_of, tells_roles
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.tokenizer import Tokenizer, find_tokenizer
from diffsynth.denoising.expert import Expert
from diffsynth.errors import AmbiguousModelError, ConfigurationError, TokenizerNotFoundError
from diffsynth.models.loras import LoRAs
from diffsynth.models.model_manager import LoadedModel, ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.facts import facts_of
from diffsynth.models.wan.image_encoder import WanImageEncoder
from diffsynth.models.wan.text_encoder import WanTextEncoder
from diffsynth.models.wan.vae_coding import CausalVAE
from diffsynth.pipelines.adapters import with_adapters
from diffsynth.pipelines.rungs import Tiling
from diffsynth.pipelines.vae_encoding import VideoEncoder
from diffsynth.video.lazy_video import LazyVideo

logger = logging.getLogger("diffsynth")

ENCODERS = ("text_encoder", "image_encoder", "vae")
# Wan2.2 wan/configs for text and for pictures; VideoX-Fun gives 0.875 to Fun Control
BOUNDARY_T2V, BOUNDARY_OF_PICTURES = 0.875, 0.900


@dataclass(kw_only=True)
class PipelineComponents:
    """What a pipeline was given. Everything may be missing until a call needs it."""

    device: torch.device
    dtype: torch.dtype
    high: Expert | None = None  # the high-noise expert, or the only DiT
    low: Expert | None = None
    role: Role | None = None  # of ``high``, where it is one expert of a pair and the other is not there
    text_encoder: WanTextEncoder | None = None
    tokenizer: Tokenizer | None = None
    image_encoder: WanImageEncoder | None = None
    vae: CausalVAE | None = None
    loras: LoRAs = field(default_factory=lambda: LoRAs([]))  # of the manager
    boundary: float = BOUNDARY_T2V
    family: str = "t2v"
    known_words: frozenset[str] = frozenset()
    generation: dict[str, object] = field(
        default_factory=dict
    )  # defaults of pipe() that the checkpoint carries
    sources: dict[str, str] = field(default_factory=dict)  # part -> file, for describe()
    few_step: frozenset[str] = frozenset()  # DiTs whose name or metadata says that they were step-distilled

    # How the VAE codes in the call under way: what `tiled` asked, and whether by plan the whole is too large.
    tiled: bool | None = None
    tiled_by_plan: bool = False

    def encode_video(
        self,
        video: Tensor | LazyVideo,
        *,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return latents (B, C, T, h, w) float32 on the device; see `VideoEncoder.latents`.

        Args:
            video: (B, 3, F, H, W), which may lie on the host.
            tile_size: height and width of a tile in latent positions; None leaves it to what fits.
            tile_stride: distance between tiles.
        """
        assert self.vae is not None
        # Without a size the whole comes first, also in a call in tiles: so a reference is coded, as in v1.
        whole_first = Tiling(False if self.tiled is False else None)
        tiling = whole_first if tile_size is None else Tiling(True, tile_size, tile_stride)
        by_plan = self.tiled_by_plan
        encoder = VideoEncoder(vae=self.vae, device=self.device, tiling=tiling, tiled_by_plan=by_plan)
        return encoder.latents(video)

    @property
    def facts(self) -> DiTFacts:
        """What the DiT and the adapters beside it read; without a DiT those of text to video."""
        if self.high is None:
            return DiTFacts(latent_channels=16 if self.vae is None else self.vae.z_dim)
        return facts_of(self.high.dit.config, (adapter.name for adapter in self.high.adapters))

    @property
    def spatial_stride(self) -> int:
        """Pixels along an edge of a latent position: the VAE's, or of the one that the DiT was made for."""
        return self.facts.spatial_stride if self.vae is None else self.vae.spatial_stride

    def networks(self) -> dict[str, torch.nn.Module | None]:
        """By the names under which they visit the device."""
        found: dict[str, torch.nn.Module | None] = {"dit": None, "dit_low_noise": None}
        for expert in (self.high, self.low):
            if expert is not None:
                found.update(zip(expert.networks, (expert.dit, *expert.adapters), strict=True))
        for name in ("text_encoder", "image_encoder", "vae"):
            network = getattr(self, name)
            found[name] = getattr(network, "_orig_mod", network)  # torch.compile wraps what it compiles
        return found


def collect(
    manager: ModelManager,
    *,
    device: torch.device,
    dtype: torch.dtype,
    dit: str | Path | Sequence[str | Path] | None = None,
    tokenizer_path: str | Path | None = None,
) -> PipelineComponents:
    """Sort a manager's networks into the parts of a pipeline.

    Args:
        manager: where they were loaded.
        device: where they compute.
        dtype: of intermediate results.
        dit: file of the DiT to use, or the two files of the high- and the low-noise expert, when several are
            loaded.
        tokenizer_path: the tokenizer's file or folder, when it does not lie beside the text encoder.

    Raises:
        AmbiguousModelError: when several networks could be meant, or two experts do not belong together.
        TokenizerNotFoundError: when the text encoder's tokenizer is not found; says where it was looked for.
        ConfigurationError: when sizes of two parts do not fit.
    """
    parts = PipelineComponents(device=device, dtype=dtype, loras=manager.loras)
    is_told = dit is not None and not isinstance(dit, (str, Path))
    _take_dits(parts, _pick_dits(manager, dit), manager.loaded, is_told=is_told)
    for attribute in ENCODERS:
        found = [entry for entry in manager.loaded if entry.match.architecture.part == attribute]
        if len(found) > 1:
            name, sources = found[0].name, ", ".join(map(_source, found))
            raise AmbiguousModelError(f"{len(found)} networks are {name}: {sources}. Load one only.")
        if found:
            setattr(parts, attribute, found[0].model)
            parts.sources[attribute] = _source(found[0])
            if attribute == "text_encoder":
                parts.tokenizer = _tokenizer(found[0], tokenizer_path)
                words = found[0].match.checkpoint.metadata.get("known_words", "")
                parts.known_words = frozenset(words.split())
    check_sizes(parts)
    return parts


def _pick_dits(manager: ModelManager, wanted: str | Path | Sequence[str | Path] | None) -> list[LoadedModel]:
    found = [entry for entry in manager.loaded if is_dit(entry.match)]
    if wanted is None:
        return found
    paths = [wanted] if isinstance(wanted, (str, Path)) else list(wanted)
    picked = []
    for path in paths:
        hits = [entry for entry in found if is_named(entry.match, path)]
        if len(hits) != 1:
            names = ", ".join(_source(e) for e in found) or "none"
            raise AmbiguousModelError(
                f"dit={str(path)!r} names {len(hits)} of the loaded DiTs; loaded: {names}."
            )
        picked += hits
    return picked


def _take_dits(
    parts: PipelineComponents, found: list[LoadedModel], loaded: Sequence[LoadedModel], *, is_told: bool
) -> None:
    if not found:
        return
    if len(found) > 2:
        names = "\n  ".join(_source(e) for e in found)
        raise AmbiguousModelError(
            f"{len(found)} DiTs are loaded; a pipeline uses one, or two experts:\n  {names}\n"
            f"Pick with from_model_manager(manager, dit={_source(found[0])!r}), or dit=[HIGH, LOW]."
        )
    high, low = found[0], None
    parts.role = high.match.role if len(found) == 1 else None
    if len(found) == 2:
        _check_pair(found[0], found[1], loaded)
        high, low = _roles(found[0], found[1], is_told=is_told)
    entries = {"dit": high} if low is None else {"dit": high, "dit_low_noise": low}
    experts = with_adapters(
        {name: (Expert(dit=_dit(e), networks=(name,)), e) for name, e in entries.items()}, loaded
    )
    parts.high, parts.low = experts["dit"], experts.get("dit_low_noise")
    parts.sources.update({name: _source(entry) for name, entry in entries.items()})
    parts.few_step = frozenset(
        name
        for name, entry in entries.items()
        if tells_few_steps(entry.paths, entry.match.checkpoint.metadata)
    )
    parts.family = high.match.family
    parts.generation = dict(high.match.generation)
    if low is not None:
        parts.generation = {**low.match.generation, **parts.generation}
        own = [[e for e in loaded if set(e.paths) & set(entry.paths)] for entry in (high, low)]
        parts.loras.assign({"high": own[0], "low": own[1]})
    parts.boundary = _boundary(parts)


def _boundary(parts: PipelineComponents) -> float:
    """Where the experts change, as a share of 1000: as the checkpoint says, else by what the DiT reads."""
    assert parts.high is not None
    planes = parts.high.dit.config.planes
    usual = BOUNDARY_OF_PICTURES if planes and "control" not in planes else BOUNDARY_T2V
    told = parts.generation.pop("boundary", usual)
    if isinstance(told, bool) or not isinstance(told, (int, float)) or not 0.0 <= told <= 1.0:
        raise ConfigurationError(
            f"The configuration of {parts.sources['dit']} says boundary is {told!r}; it is a share of 1000, "
            f"0 to 1 ({usual} for this model). Correct it, or take it out and give switch_DiT_boundary=."
        )
    return float(told)


def _check_pair(first: LoadedModel, second: LoadedModel, loaded: Sequence[LoadedModel]) -> None:
    """Refuse two DiTs that are not the two experts of one model."""
    pair = (first, second)
    config, other = (_dit(entry).config for entry in pair)
    differing = [f.name for f in fields(config) if getattr(config, f.name) != getattr(other, f.name)]
    beside = [
        {e.name for e in loaded if not is_dit(e.match) and set(e.paths) & set(entry.paths)} for entry in pair
    ]
    if not differing and beside[0] == beside[1]:
        return
    lines = [
        f"{_source(entry)}: {entry.match.family}, "
        + ", ".join(
            [f"{name} {getattr(_dit(entry).config, name)}" for name in differing] or sorted(own) or ["alone"]
        )
        for entry, own in zip(pair, beside, strict=True)
    ]
    raise AmbiguousModelError(
        "Two DiTs are loaded that are no pair of experts, for they differ:\n  " + "\n  ".join(lines) + "\n"
        f"Load the two experts of one model, or pick one DiT with from_model_manager(manager, "
        f"dit={_source(first)!r})."
    )


def _roles(first: LoadedModel, second: LoadedModel, *, is_told: bool) -> tuple[LoadedModel, LoadedModel]:
    """Which is the high-noise expert: as the caller, else the file or its path says, else by order."""
    names = f"{_source(first)} and {_source(second)}"
    pair = (first.match, second.match)
    roles = roles_of(pair)
    if is_told:
        if roles == ("low", "high"):
            logger.warning(
                "dit=[HIGH, LOW] takes %s for high noise, as given, and the paths say the opposite.",
                _source(first),
            )
        return first, second
    if roles is None:
        raise AmbiguousModelError(
            f"Both {names} are {first.match.role}-noise experts; load one of each, or pick one with dit=."
        )
    if tells_roles(pair):
        return (first, second) if roles == ("high", "low") else (second, first)
    if is_of_no_pair(first.match.config):
        raise AmbiguousModelError(
            f"Two DiTs are loaded, {names}, and nothing says that they are the two experts of one model: no "
            f"released pair has their sizes. Pick one with dit={str(first.paths[0])!r} (--dit); of a pair of "
            "your own, say which is which: dit=[HIGH, LOW] (--dit HIGH --dit LOW)."
        )
    logger.warning(
        "Neither path of %s says high_noise or low_noise: the first is taken for high noise, the second for "
        "low. Say it with from_model_manager(manager, dit=[HIGH, LOW]), or exchange them with "
        "pipe.swap_experts(). If they are two models and no pair, pick one with dit=.",
        names,
    )
    return first, second


def check_sizes(parts: PipelineComponents) -> None:
    """Refuse parts that do not belong together; raises ConfigurationError."""
    if parts.high is None:
        return
    config = parts.high.dit.config
    if parts.text_encoder is not None and parts.text_encoder.config.dim != config.text_dim:
        raise ConfigurationError(
            f"The text encoder ({parts.sources.get('text_encoder', 'set')}) gives features "
            f"{parts.text_encoder.config.dim} wide and the DiT ({parts.sources['dit']}) reads "
            f"{config.text_dim}; load the text encoder that belongs to this DiT."
        )
    if parts.image_encoder is not None and config.image_dim not in (None, parts.image_encoder.config.dim):
        raise ConfigurationError(
            f"The image encoder ({parts.sources.get('image_encoder', 'set')}) gives features "
            f"{parts.image_encoder.config.dim} wide and the DiT ({parts.sources['dit']}) reads "
            f"{config.image_dim}; load the image encoder that belongs to this DiT."
        )
    if parts.vae is not None and parts.vae.z_dim != config.out_dim:
        raise ConfigurationError(
            f"The VAE ({parts.sources.get('vae', 'set')}) has {parts.vae.z_dim} latent channels and the DiT "
            f"({parts.sources['dit']}) {config.out_dim}; load the VAE that belongs to this DiT."
        )


def _tokenizer(entry: LoadedModel, tokenizer_path: str | Path | None) -> Tokenizer:
    try:
        return Tokenizer(find_tokenizer(entry.paths[0], tokenizer_path))
    except TokenizerNotFoundError:
        attachments = entry.match.attachments
        if tokenizer_path is not None or attachments is None or "spiece_model" not in attachments.shapes:
            raise
        # ComfyUI's files carry the tokenizer as one tensor of bytes.
        return Tokenizer(bytes(attachments.tensor("spiece_model").tolist()))


def _dit(entry: LoadedModel) -> WanDiT:
    assert isinstance(entry.model, WanDiT)
    return entry.model


def _source(entry: LoadedModel) -> str:
    more = f" (+{len(entry.paths) - 1} shards)" if len(entry.paths) > 1 else ""
    return f"{entry.paths[0]}{more}"

"""The parts of a pipeline, found in a ModelManager and checked to belong together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffsynth.conditioning.tokenizer import Tokenizer, find_tokenizer
from diffsynth.denoising.expert import Expert
from diffsynth.errors import AmbiguousModelError, ConfigurationError, TokenizerNotFoundError
from diffsynth.models.loras import LoRAs
from diffsynth.models.model_manager import LoadedModel, ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.image_encoder import WanImageEncoder
from diffsynth.models.wan.text_encoder import WanTextEncoder
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.pipelines.adapters import with_adapters

logger = logging.getLogger("diffsynth")

ENCODERS = {
    "wan_video_text_encoder": "text_encoder",
    "wan_video_image_encoder": "image_encoder",
    "wan_video_vae": "vae",
}  # name in the manager -> part of the pipeline
BOUNDARY_T2V, BOUNDARY_WITH_PLANES = 0.875, 0.900  # Wan2.2 wan/configs


@dataclass(kw_only=True)
class PipelineComponents:
    """What a pipeline was given. Everything may be missing until a call needs it."""

    device: torch.device
    dtype: torch.dtype
    high: Expert | None = None  # the high-noise expert, or the only DiT
    low: Expert | None = None
    text_encoder: WanTextEncoder | None = None
    tokenizer: Tokenizer | None = None
    image_encoder: WanImageEncoder | None = None
    vae: WanVideoVAE | None = None
    loras: LoRAs = field(default_factory=lambda: LoRAs([]))  # of the manager
    boundary: float = BOUNDARY_T2V
    family: str = "t2v"
    known_words: frozenset[str] = frozenset()
    generation: dict[str, object] = field(
        default_factory=dict
    )  # defaults of pipe() that the checkpoint carries
    sources: dict[str, str] = field(default_factory=dict)  # part -> file, for describe()

    @property
    def planes(self) -> Mapping[str, int]:
        """Channels of each plane that the DiT reads beside the noise; empty for text to video."""
        return {} if self.high is None else self.high.dit.config.planes

    @property
    def has_image_branch(self) -> bool:
        """Whether the DiT reads tokens of an image encoder."""
        return self.high is not None and self.high.dit.config.image_dim is not None

    @property
    def image_dim(self) -> int | None:
        """Width of the features that the DiT reads of an image encoder; None: it reads none."""
        return None if self.high is None else self.high.dit.config.image_dim

    @property
    def has_image_positions(self) -> bool:
        """Whether image tokens have learned positions: those of a first and a last frame."""
        return self.high is not None and self.high.dit.config.image_tokens_pos is not None

    @property
    def adapters(self) -> frozenset[str]:
        """Names of the adapters beside the DiT."""
        return frozenset() if self.high is None else frozenset(a.name for a in self.high.adapters)

    def networks(self) -> dict[str, torch.nn.Module | None]:
        """By the names under which they visit the device."""
        found: dict[str, torch.nn.Module | None] = {"dit": None, "dit_low_noise": None}
        for expert in (self.high, self.low):
            if expert is not None:
                found.update(zip(expert.networks, (expert.dit, *expert.adapters), strict=True))
        return {
            **found, "text_encoder": self.text_encoder, "image_encoder": self.image_encoder, "vae": self.vae,
        }  # fmt: skip


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
    _take_dits(parts, _pick_dits(manager, dit), manager.loaded)
    for name, attribute in ENCODERS.items():
        found = [entry for entry in manager.loaded if entry.name == name]
        if len(found) > 1:
            raise AmbiguousModelError(
                f"{len(found)} networks are {name}: {', '.join(_source(e) for e in found)}. Load one only."
            )
        if found:
            setattr(parts, attribute, found[0].model)
            parts.sources[attribute] = _source(found[0])
            if attribute == "text_encoder":
                parts.tokenizer = _tokenizer(found[0], tokenizer_path)
                words = found[0].match.checkpoint.metadata.get("known_words", "")
                parts.known_words = frozenset(words.split())
    _check_sizes(parts)
    return parts


def _pick_dits(manager: ModelManager, wanted: str | Path | Sequence[str | Path] | None) -> list[LoadedModel]:
    found = [entry for entry in manager.loaded if entry.name == "wan_video_dit"]
    if wanted is None:
        return found
    paths = [wanted] if isinstance(wanted, (str, Path)) else list(wanted)
    picked = []
    for path in paths:
        resolved = Path(path).expanduser().resolve()
        hits = [
            e
            for e in found
            if any(resolved == p.resolve() or resolved in p.resolve().parents for p in e.paths)
        ]
        if len(hits) != 1:
            names = ", ".join(_source(e) for e in found) or "none"
            raise AmbiguousModelError(
                f"dit={str(path)!r} names {len(hits)} of the loaded DiTs; loaded: {names}."
            )
        picked += hits
    return picked


def _take_dits(parts: PipelineComponents, found: list[LoadedModel], loaded: Sequence[LoadedModel]) -> None:
    if not found:
        return
    if len(found) > 2:
        names = "\n  ".join(_source(e) for e in found)
        raise AmbiguousModelError(
            f"{len(found)} DiTs are loaded; a pipeline uses one, or two experts:\n  {names}\n"
            f"Pick with from_model_manager(manager, dit={_source(found[0])!r}), or dit=[HIGH, LOW]."
        )
    high, low = found[0], None
    if len(found) == 2:
        high, low = _roles(found[0], found[1])
    entries = {"dit": high} if low is None else {"dit": high, "dit_low_noise": low}
    experts = with_adapters(
        {name: (Expert(dit=_dit(e), networks=(name,)), e) for name, e in entries.items()}, loaded
    )
    parts.high, parts.low = experts["dit"], experts.get("dit_low_noise")
    parts.sources.update({name: _source(entry) for name, entry in entries.items()})
    parts.family = high.match.family
    parts.generation = dict(high.match.generation)
    usual = BOUNDARY_WITH_PLANES if parts.high.dit.config.planes else BOUNDARY_T2V
    parts.boundary = float(str(parts.generation.pop("boundary", usual)))


def _roles(first: LoadedModel, second: LoadedModel) -> tuple[LoadedModel, LoadedModel]:
    """Which is the high-noise expert: told by the path, else by order, with a warning."""
    names = f"{_source(first)} and {_source(second)}"
    if _dit(first).config != _dit(second).config:
        raise AmbiguousModelError(
            f"Two DiTs of different configuration are loaded, {names}; they are no pair of experts. "
            f"Pick one with from_model_manager(manager, dit={_source(first)!r})."
        )
    roles = (first.match.role, second.match.role)
    if roles in (("high", "low"), ("high", None), (None, "low")):
        return first, second
    if roles in (("low", "high"), ("low", None), (None, "high")):
        return second, first
    if roles[0] is not None:
        raise AmbiguousModelError(
            f"Both {names} are {roles[0]}-noise experts; load one of each, or pick one with dit=."
        )
    logger.warning(
        "Neither path of %s says high_noise or low_noise: the first is taken for high noise, the second for "
        "low. "
        "Say it with from_model_manager(manager, dit=[HIGH, LOW]).",
        names,
    )
    return first, second


def _check_sizes(parts: PipelineComponents) -> None:
    if parts.high is None:
        return
    config = parts.high.dit.config
    if parts.text_encoder is not None and parts.text_encoder.config.dim != config.text_dim:
        raise ConfigurationError(
            f"The text encoder ({parts.sources['text_encoder']}) gives features "
            f"{parts.text_encoder.config.dim} wide and the DiT ({parts.sources['dit']}) reads "
            f"{config.text_dim}; load the text encoder that belongs to this DiT."
        )
    if parts.image_encoder is not None and config.image_dim not in (None, parts.image_encoder.config.dim):
        raise ConfigurationError(
            f"The image encoder ({parts.sources['image_encoder']}) gives features "
            f"{parts.image_encoder.config.dim} wide and the DiT ({parts.sources['dit']}) reads "
            f"{config.image_dim}; load the image encoder that belongs to this DiT."
        )
    if parts.vae is not None and parts.vae.config.z_dim != config.out_dim:
        raise ConfigurationError(
            f"The VAE ({parts.sources['vae']}) has {parts.vae.config.z_dim} latent channels and the DiT "
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

"""Which adapters belong to which DiT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffsynth.denoising.expert import Expert
from diffsynth.errors import AmbiguousModelError, ConfigurationError
from diffsynth.models.model_manager import LoadedModel
from diffsynth.models.wan.adapters.adapter import DiTAdapter


def with_adapters(
    experts: Mapping[str, tuple[Expert, LoadedModel]], loaded: Sequence[LoadedModel]
) -> dict[str, Expert]:
    """Give each expert its adapters: those of its own file, and those that lie in a file of their own.

    Args:
        experts: by the name under which the DiT comes to the device, with where it was loaded from.
        loaded: all networks of the manager.

    Raises:
        AmbiguousModelError: when two adapters of one kind are for one DiT.
        ConfigurationError: when an adapter fits none of the DiTs.
    """
    dit_files = {path for entry in loaded if not isinstance(entry.model, DiTAdapter) for path in entry.paths}
    found: dict[str, dict[str, LoadedModel]] = {name: {} for name in experts}
    for entry in loaded:
        if not isinstance(entry.model, DiTAdapter):
            continue
        is_alone = not set(entry.paths) & dit_files
        owners = [
            name
            for name, (_, dit) in experts.items()
            if set(entry.paths) & set(dit.paths) or (is_alone and _serves(entry, name, len(experts)))
        ]
        for name in owners:
            _check_fit(entry, *experts[name])
            if (other := found[name].setdefault(entry.model.name, entry)) is not entry:
                raise AmbiguousModelError(
                    f"{other.paths[0]} and {entry.paths[0]} both hold {entry.match.needs}; load one of them."
                )
    return {name: _equipped(expert, name, found) for name, (expert, _) in experts.items()}


def _serves(adapter: LoadedModel, name: str, num_experts: int) -> bool:
    """Whether an adapter in a file of its own is for this expert: for both, unless its path says."""
    role = "low" if name.endswith("_low_noise") else "high"
    return num_experts < 2 or adapter.match.role in (None, role)


def _check_fit(entry: LoadedModel, expert: Expert, dit: LoadedModel) -> None:
    width, own = expert.dit.config.dim, entry.match.require_config().get("dim")
    if own != width:
        raise ConfigurationError(
            f"{entry.paths[0]} holds {entry.match.needs} for a DiT of width {own}; the one loaded from "
            f"{dit.paths[0]} has {width}. Load the pair that belongs together."
        )
    assert isinstance(entry.model, DiTAdapter)
    entry.model.join(expert.dit.config)


def _equipped(expert: Expert, name: str, found: Mapping[str, Mapping[str, LoadedModel]]) -> Expert:
    own = found[name]
    first = next(iter(found.values()))
    networks = [
        kind if first.get(kind) is entry else kind + name.removeprefix("dit") for kind, entry in own.items()
    ]
    adapters = tuple(entry.model for entry in own.values() if isinstance(entry.model, DiTAdapter))
    return replace(expert, adapters=adapters, networks=(name, *networks))

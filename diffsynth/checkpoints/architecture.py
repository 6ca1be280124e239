"""What a row of the registry says about one network, and what detection answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffsynth.checkpoints.hints import Hints, Role, Shapes
from diffsynth.errors import ConfigurationError

if TYPE_CHECKING:
    from diffsynth.checkpoints.checkpoint import Checkpoint

Config = Mapping[str, object]


def _always(shapes: Shapes) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One network that can stand in a checkpoint. Names are the official ones."""

    name: str  # for fetch_model: "wan_video_vace"
    title: str  # for people: "VACE adapter"
    part: str  # its place in a pipeline: "dit", "vae"; of an adapter its own name: "vace"
    module: str | None  # "package.module:Class", imported when it is built; None: recognised but not built
    marks: tuple[str, ...]  # tensors that only this network has; all must be there
    owns: str  # regular expression: the tensors that belong to it
    config: Callable[[Shapes, Hints], Config]  # header and hints -> plain sizes for Class.from_config
    family: Callable[[Shapes, Hints, Config], str] | str = ""  # the kind within the name; empty: the name
    fits: Callable[[Shapes], bool] = _always  # what marks cannot say
    is_adapter: bool = False  # it works beside a DiT, and is named after its part in `Conditions`
    planned_in: str = ""  # for rows that are not built: what to expect


@dataclass(frozen=True, kw_only=True)
class Match:
    """One network found in a checkpoint."""

    architecture: Architecture
    family: str  # "t2v", "i2v", ... for a DiT; the name for others
    checkpoint: Checkpoint  # the network's own tensors under their official names
    config: Config
    layout: str  # "official", "diffusers", "comfyui", with "+fp8-scaled" and the like behind
    prefix: str = ""  # what stood in front of every name
    assumed: list[str] = field(default_factory=list)  # what no shape tells and no file said, as sentences
    missing: list[str] = field(default_factory=list)  # keys without which it cannot be built, as sentences
    left_over: list[str] = field(
        default_factory=list
    )  # tensors of the file that no row owns; on the first match
    generation: Mapping[str, object] = field(
        default_factory=dict
    )  # defaults of pipe(...) that the file carries
    role: Role | None = None  # which expert of a pair
    attachments: Checkpoint | None = None  # tensors that are no weights: ComfyUI's ``spiece_model``

    @property
    def name(self) -> str:
        """The name for fetch_model."""
        return self.architecture.name

    @property
    def parameters(self) -> int:
        """Elements of the network's tensors."""
        return self.checkpoint.num_parameters

    @property
    def needs(self) -> str:
        """What it is, in a few words, for messages."""
        kind = self.family if self.family != self.name else self.architecture.title
        return f"{self.name} ({kind})"

    def require_config(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigurationError: when a key is missing; names it and how to give it.
        """
        if self.missing:
            raise ConfigurationError(
                f"{self.checkpoint.source} is {self.needs}, but " + " ".join(self.missing)
            )
        return self.config

"""LoRAs of a pipeline: those of its manager, whose methods are here too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth.checkpoints.files import PathLike
    from diffsynth.checkpoints.hints import Role
    from diffsynth.lora.matching import LoRAReport
    from diffsynth.models.lora_experts import Expert, PerExpert
    from diffsynth.models.loras import Mode, Weight
    from diffsynth.pipelines.components import PipelineComponents


class LoRAMethods:
    """Forwards to the manager that a pipeline was made of; see the methods of `ModelManager`."""

    parts: PipelineComponents

    def load_lora(
        self,
        file_path: PathLike | Sequence[PathLike],
        lora_alpha: float | PerExpert = 1.0,
        name: str | None = None,
        mode: Mode = "fuse",
        network: str | None = None,
        *,
        expert: Expert | None = None,
    ) -> list[LoRAReport]:
        """See `ModelManager.load_lora`; limits on memory are planned anew."""
        return self.parts.loras.load(file_path, lora_alpha, name, mode, network, expert)

    def set_lora(self, name: str, weight: Weight | Mapping[Role, Weight]) -> None:
        """See `ModelManager.set_lora`."""
        self.parts.loras.set(name, weight)

    def disable_lora(self, name: str | None = None) -> None:
        """See `ModelManager.disable_lora`."""
        self.parts.loras.disable(name)

    def unload_lora(self, name: str | None = None) -> None:
        """See `ModelManager.unload_lora`."""
        self.parts.loras.unload(name)

"""LoRAs of a pipeline: those of its manager, whose methods are here too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from diffsynth.errors import ArgumentError
from diffsynth.pipelines.model_config import ModelConfig
from diffsynth.pipelines.networks import unwrapped

if TYPE_CHECKING:
    from diffsynth.checkpoints.files import PathLike
    from diffsynth.checkpoints.hints import Role
    from diffsynth.lora.matching import LoRAReport
    from diffsynth.models.lora_experts import Expert, PerExpert
    from diffsynth.models.loras import Mode, Weight
    from diffsynth.pipelines.components import PipelineComponents

    Files = PathLike | Sequence[PathLike] | ModelConfig


class LoRAMethods:
    """Forwards to the manager that a pipeline was made of; see the methods of `ModelManager`."""

    parts: PipelineComponents

    def load_lora(  # noqa: PLR0913  (the spellings of two libraries)
        self,
        file_path: Files | nn.Module = "",
        lora_alpha: float | PerExpert | Files = 1.0,
        name: str | None = None,
        mode: Mode = "fuse",
        network: str | None = None,
        *,
        expert: Expert | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        lora_config: Files | None = None,
        alpha: float | None = None,
        hotload: bool | None = None,
    ) -> list[LoRAReport]:
        """See `ModelManager.load_lora`; limits on memory are planned anew.

        DiffSynth-Studio's later spelling is read too: ``load_lora(pipe.dit, FILE, alpha=1.0)`` uses the file
        on that network alone, and ``hotload=True`` attaches it.
        """
        only: nn.Module | None = None
        if isinstance(file_path, nn.Module):
            only, file_path = unwrapped(file_path), ""
            if not isinstance(lora_alpha, (int, float, Mapping)):
                file_path, lora_alpha = lora_alpha, 1.0
            if isinstance(name, (int, float)):  # FILE, ALPHA
                alpha, name = name, None
        if lora_config is not None:
            if file_path:
                raise ArgumentError(f"{file_path} and lora_config= are both given; give one of them.")
            file_path = lora_config
        if isinstance(file_path, ModelConfig):
            file_path.download_if_necessary()
            file_path = cast("PathLike | Sequence[PathLike]", file_path.path)
        if alpha is not None:
            if lora_alpha != 1.0:
                raise ArgumentError(f"lora_alpha is {lora_alpha} and alpha is {alpha}: give one of them.")
            lora_alpha = alpha
        return self.parts.loras.load(
            file_path, cast("float | PerExpert", lora_alpha), name, "attach" if hotload else mode, network,
            expert, state_dict=state_dict, only=only,
        )  # fmt: skip

    def set_lora(self, name: str, weight: Weight | Mapping[Role, Weight]) -> None:
        """See `ModelManager.set_lora`."""
        self.parts.loras.set(name, weight)

    def disable_lora(self, name: str | None = None) -> None:
        """See `ModelManager.disable_lora`."""
        self.parts.loras.disable(name)

    def unload_lora(self, name: str | None = None) -> None:
        """See `ModelManager.unload_lora`."""
        self.parts.loras.unload(name)

    def clear_lora(self) -> None:
        """All LoRAs go, as `unload_lora` does: DiffSynth-Studio's name for it."""
        self.parts.loras.unload()

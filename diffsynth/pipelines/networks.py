"""The networks of a pipeline as attributes that can be exchanged: ``pipe.dit = torch.compile(pipe.dit)``.

What torch.compile returns wraps a network: it is called in place of it, and everything else (memory, LoRAs,
sizes) goes on with the network inside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import nn

from diffsynth.errors import ArgumentError
from diffsynth.models.loras import LoRAs
from diffsynth.models.model_manager import resolved_device
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.image_encoder import WanImageEncoder
from diffsynth.models.wan.text_encoder import WanTextEncoder
from diffsynth.models.wan.vae_coding import CausalVAE
from diffsynth.pipelines.components import check_sizes

if TYPE_CHECKING:
    from diffsynth.denoising.expert import Expert
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.pipelines.memory import MemoryManager

P = TypeVar("P", bound="NetworkAttributes")
Side = Literal["high", "low"]
FROM_SCRIPT = "a network that the script set"


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside of what torch.compile returned."""
    inner = getattr(network, "_orig_mod", network)
    return inner if isinstance(inner, nn.Module) else network


class NetworkAttributes:
    """What a pipeline is made of; see this module's legend."""

    parts: PipelineComponents
    _memory: MemoryManager

    if TYPE_CHECKING:
        _resting: Callable[[], AbstractContextManager[None]]

    @property
    def dit(self) -> nn.Module | None:
        """The DiT, or the high-noise expert."""
        return _called(self.parts.high)

    @dit.setter
    def dit(self, network: nn.Module | None) -> None:
        self._set_dit("high", "dit", network)

    @property
    def dit2(self) -> nn.Module | None:
        """The low-noise expert."""
        return _called(self.parts.low)

    @dit2.setter
    def dit2(self, network: nn.Module | None) -> None:
        self._set_dit("low", "dit2", network)

    @property
    def vae(self) -> nn.Module | None:
        """The video VAE."""
        return self.parts.vae

    @vae.setter
    def vae(self, network: nn.Module | None) -> None:
        # Its coding is no call of the module but methods, which a wrapper passes on: they run as they are.
        self._set("vae", CausalVAE, None if network is None else unwrapped(network))

    @property
    def text_encoder(self) -> nn.Module | None:
        """The text encoder."""
        return self.parts.text_encoder

    @text_encoder.setter
    def text_encoder(self, network: nn.Module | None) -> None:
        self._set("text_encoder", WanTextEncoder, network)

    @property
    def image_encoder(self) -> nn.Module | None:
        """The CLIP image encoder."""
        return self.parts.image_encoder

    @image_encoder.setter
    def image_encoder(self, network: nn.Module | None) -> None:
        self._set("image_encoder", WanImageEncoder, network)

    @property
    def vace(self) -> nn.Module | None:
        """The VACE adapter, of the high-noise expert where there are two."""
        return _adapter(self.parts.high, "vace")

    @property
    def vace2(self) -> nn.Module | None:
        """The VACE adapter of the low-noise expert."""
        return _adapter(self.parts.low, "vace")

    @property
    def motion_controller(self) -> nn.Module | None:
        """The speed adapter."""
        return _adapter(self.parts.high, "speed")

    @property
    def device(self) -> torch.device:
        """Where networks compute."""
        return self.parts.device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        try:
            chosen = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ArgumentError(f"device is {device!r}; give 'cuda', 'cuda:1' or 'cpu'.") from error
        chosen = resolved_device(chosen)
        with self._resting():
            self.parts.device = chosen
            self._memory.move_to(chosen)

    def to(self: P, device: str | torch.device) -> P:
        """Compute there from now on; weights keep their dtype, see ``torch_dtype=`` where they are loaded."""
        if isinstance(device, torch.dtype):
            raise ArgumentError(
                f"to({device}) would change the weights' dtype; give torch_dtype= where they are loaded."
            )
        self.device = device  # type: ignore[assignment]  # the setter takes names too
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of intermediate results."""
        return self.parts.dtype

    def _set_dit(self, side: Side, attribute: str, network: nn.Module | None) -> None:
        expert: Expert | None = getattr(self.parts, side)
        if network is None or expert is None:
            raise ArgumentError(
                f"pipe.{attribute} cannot be {'taken away' if network is None else 'added'}: what a pipeline "
                "reads and its defaults follow from its DiTs. Make a pipeline of those that you want."
            )
        inner = unwrapped(_checked(attribute, network))
        if not isinstance(inner, WanDiT):
            raise _other_kind(attribute, inner, WanDiT)
        if inner.config != expert.dit.config:
            raise ArgumentError(
                f"pipe.{attribute} has other sizes than the DiT that it replaces; load it with "
                "ModelManager.load_models and make a pipeline of it."
            )
        with self._resting():
            call = cast("Callable[..., Any]", network) if network is not inner else None
            setattr(self.parts, side, replace(expert, dit=inner, call=call))
            self._changed("dit" if side == "high" else "dit_low_noise", expert.dit, inner)

    def _set(self, attribute: str, kind: type[nn.Module], network: nn.Module | None) -> None:
        if network is not None and not isinstance(unwrapped(_checked(attribute, network)), kind):
            raise _other_kind(attribute, unwrapped(network), kind)
        if attribute == "text_encoder" and network is not None and self.parts.tokenizer is None:
            raise ArgumentError(
                "pipe.text_encoder was set on a pipeline without a tokenizer; load a text encoder with it, "
                "or give pipe() prompt_embeds=."
            )
        before = getattr(self.parts, attribute)
        with self._resting():
            setattr(self.parts, attribute, network)
            try:
                check_sizes(self.parts)
            except ValueError:
                setattr(self.parts, attribute, before)
                raise
            self._changed(attribute, before, network)

    def _changed(self, name: str, before: nn.Module | None, after: nn.Module | None) -> None:
        self._memory.find_networks()
        if after is None:
            self.parts.sources.pop(name, None)
        elif before is None or unwrapped(after) is not unwrapped(before):
            self.parts.sources[name] = FROM_SCRIPT
        if isinstance(after, WanDiT) and not self.parts.loras.holds(after):
            # A DiT that no manager has loaded: LoRAs would go to the one that it replaces.
            self.parts.loras = LoRAs([])


def _called(expert: Expert | None) -> nn.Module | None:
    if expert is None:
        return None
    return expert.dit if expert.call is None else cast("nn.Module", expert.call)


def _adapter(expert: Expert | None, name: str) -> nn.Module | None:
    return next((a for a in expert.adapters if a.name == name), None) if expert is not None else None


def _checked(attribute: str, network: object) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"pipe.{attribute} is {network!r}; give a network, or torch.compile of one.")
    if any(type(parameter).__name__ == "DTensor" for parameter in unwrapped(network).parameters()):
        raise ArgumentError(
            f"pipe.{attribute} is cut over several devices (DTensor): tensor parallelism, as all of several "
            "GPUs for one video, is not in this version; leave parallelize_module out."
        )
    return network


def _other_kind(attribute: str, network: nn.Module, kind: type[nn.Module]) -> ArgumentError:
    return ArgumentError(
        f"pipe.{attribute} is a {type(network).__name__}; give a {kind.__name__} or torch.compile of one: "
        "pipelines call more of a network than its forward."
    )

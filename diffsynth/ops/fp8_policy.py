"""Which layers of a network are kept in fp8, and how they multiply."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from diffsynth.errors import ArgumentError
from diffsynth.ops.fp8 import FP8_NAME, Compute, Fp8Linear, fp8_layers, quantise

FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Policy:
    """Which Linear layers of a network keep well in fp8; a network's class has one as ``fp8_policy``.

    Norms, biases, modulation, embeddings and heads are no Linear layers of blocks, and stay wide everywhere.
    """

    blocks: str = "blocks"  # the name of the list of blocks in checkpoints
    num_edge_blocks: int = 0  # at either end of it that stay wide: errors show most there
    multiplies: tuple[str, ...] = ()  # beginnings of names inside a block: these may also multiply in fp8

    def layers(self, network: nn.Module) -> dict[str, nn.Linear]:
        """The layers, by name."""
        blocks = list(network.get_submodule(self.blocks).named_children())
        return {
            f"{self.blocks}.{index}.{name}": layer
            for index, block in blocks[self.num_edge_blocks : len(blocks) - self.num_edge_blocks]
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        }

    def may_multiply(self, name: str) -> bool:
        """Whether the layer of this name may multiply in fp8."""
        return name.removeprefix(f"{self.blocks}.").partition(".")[2].startswith(self.multiplies)


def put_fp8_layers(network: nn.Module) -> list[str]:
    """Put an `Fp8Linear` in the place of each layer that the network's ``fp8_policy`` names.

    Returns:
        The names of these layers; none for a network without a policy.
    """
    policy: Fp8Policy | None = getattr(network, "fp8_policy", None)
    found = {} if policy is None else policy.layers(network)
    for name, linear in found.items():
        assert policy is not None
        parent, _, child = name.rpartition(".")
        layer = Fp8Linear(linear, may_multiply=policy.may_multiply(name))
        setattr(network.get_submodule(parent), child, layer)
    return list(found)


def choose_fp8_compute(device: torch.device, asked: Compute | None = None) -> tuple[Compute, str]:
    """Return how fp8 layers multiply on a device, and why.

    Widened unless fp8 is asked for. The fp8 product makes a step 1.1 to 1.2 times as fast, and it rounds
    every activation: long videos of some Wan models have come out as noise (attention and FFN in fp8), others
    as good as before. Only the eye can tell, so that the user chooses.

    Source: vllm-project/vllm-omni 2920 and 7549, kijai/ComfyUI-WanVideoWrapper 266, LightX2V.
    """
    if asked == "widened":
        return "widened", "asked for"
    refusal = _refusal(device)
    if asked == "fp8":
        return ("fp8", "asked for") if refusal is None else ("widened", refusal)
    if refusal is not None:
        return "widened", refusal
    return "widened", "the default: fp8 products are faster, but some models draw noise with them"


@cache
def _refusal(device: torch.device) -> str | None:
    """Why a device does not multiply fp8 row by row; None if it does. Told by its kind, then by trying."""
    if device.type != "cuda":
        return f"{device.type} has no fast fp8 product"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, FP8_CAPABILITY))
        return f"{name} has compute capability {has}; fp8 products need {needs}"
    try:
        _try_product(device)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        return f"torch {torch.__version__} refuses row-wise fp8 products on {name} ({why})"
    return None


def _try_product(device: torch.device) -> None:
    layer = Fp8Linear(nn.Linear(64, 64, bias=False, device=device))
    layer.weight.data, layer.weight_scale = quantise(torch.ones(64, 64, device=device))
    layer.compute = "fp8"
    layer(torch.ones(32, 64, dtype=torch.bfloat16, device=device))


def set_fp8_compute(network: nn.Module, device: torch.device, asked: Compute | None = None) -> str:
    """Choose how a network's fp8 layers multiply on ``device``; return why, for the log.

    Only layers that its `Fp8Policy` allows multiply in fp8: the others stay widened.

    Raises:
        ArgumentError: when fp8 products are asked for and this device has none, or ``asked`` is unknown.
    """
    if asked not in (None, "widened", "fp8"):
        raise ArgumentError(f"fp8_compute is {asked!r}; give 'widened', 'fp8' or None.")
    compute, reason = choose_fp8_compute(device, asked)
    if asked == "fp8" and compute != "fp8":
        raise ArgumentError(
            f"fp8_compute is 'fp8', but {reason}. Use 'widened': weights stay in fp8 and are widened to "
            "multiply."
        )
    for layer in fp8_layers(network):
        layer.compute = compute if layer.may_multiply else "widened"
    return reason


def fp8_summary(network: nn.Module) -> str | None:
    """What a network keeps in fp8 and how it computes, in one line; None when it keeps nothing so."""
    layers = fp8_layers(network)
    if not layers:
        return None
    multiplied = sum(layer.compute == "fp8" for layer in layers)
    how = f"{multiplied} multiply in fp8, the others are widened" if multiplied else "widened to multiply"
    return f"{len(layers)} Linear layers in {FP8_NAME}, {how}"

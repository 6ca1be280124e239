"""From a match to a network: its class is imported now, its weights are views of the mapped file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from diffsynth.checkpoints.architecture import Config, Match
from diffsynth.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffsynth.checkpoints.checkpoint import Checkpoint


class NetworkClass(Protocol):
    """What every network's class offers.

    A network may have ``unread``: beginnings of names in its checkpoint that stand for nothing it computes;
    these tensors are never read.
    """

    def from_config(self, config: Config) -> nn.Module:
        """Build the network with these sizes."""


def build(match: Match, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Return the network of ``match`` with its weights, in evaluation mode, without gradients.

    Args:
        match: an answer of `detect`.
        dtype: of the floating-point weights; None keeps the file's (quantised ones become bfloat16). On the
            CPU a weight that needs no cast stays a view of the mapped file: no memory of its own.
            ``torch.float8_e4m3fn`` keeps the layers in fp8 that the network's ``fp8_policy`` names, and all
            else in bfloat16.
        device: where the weights shall be; "meta": nothing is read, the network is its outline: names, shapes
            and dtypes.

    Raises:
        UnsupportedModelError: when this version does not build the network.
        ConfigurationError: when a size is missing; names the key.
        IncompleteCheckpointError: when tensors are missing, unknown or of another shape; names them.
        CorruptCheckpointError: when a weight that shall be kept in fp8 holds NaN or infinity.
    """
    import torch

    config = match.require_config()
    network = _empty(load_class(match), config)
    unread: tuple[str, ...] = getattr(network, "unread", ())
    names = [name for name in match.checkpoint.shapes if not name.startswith(unread)]
    _check_tensors(match, network, names)
    kept: set[str] = set()
    is_outline = torch.device(device).type == "meta"
    if is_outline and dtype is not None:
        network.to(torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype)
    if dtype == torch.float8_e4m3fn:
        dtype, kept = torch.bfloat16, _make_fp8(network)
    if is_outline:
        return network.requires_grad_(False).eval()
    weights: dict[str, Tensor] = {}
    for name in names:
        if name in kept:
            weights[name], weights[f"{name}_scale"] = fp8_pair(match.checkpoint, name, device)
        else:
            weights[name] = match.checkpoint.tensor(name, device, dtype)
    network.load_state_dict(weights, strict=True, assign=True)
    left = [
        name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta
    ]
    if left:
        raise ConfigurationError(
            f"{match.architecture.module} made {left[0]} while it was built; a network keeps tables that are "
            "not in its checkpoint out of its buffers."
        )
    return network.requires_grad_(False).eval()


def _empty(network_class: NetworkClass, config: Config) -> nn.Module:
    """Build a network without memory and without drawing initial weights, which the file replaces."""
    import torch
    from torch.overrides import TorchFunctionMode

    class NoInitialWeights(TorchFunctionMode):
        # Drawing on the meta device makes torch import its compiler: over a second, for nothing.
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            given = kwargs or {}
            if getattr(func, "__module__", None) == "torch.nn.init" or func is torch.Tensor.normal_:
                return given["tensor"] if "tensor" in given else args[0]
            return func(*args, **given)

    with torch.device("meta"), NoInitialWeights():
        return network_class.from_config(config)


def _make_fp8(network: nn.Module) -> set[str]:
    """Let the layers of the network's policy hold fp8; return the names of their weights."""
    from diffsynth.ops.fp8_policy import put_fp8_layers
    from diffsynth.vram_management.fp8 import widening
    from diffsynth.vram_management.visit import BlockNetwork

    layers = put_fp8_layers(network)
    if layers and isinstance(network, BlockNetwork):
        network.visit = widening(network, network.visit)
    return {f"{name}.weight" for name in layers}


def fp8_pair(checkpoint: Checkpoint, name: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Return a weight as e4m3 elements (rows, columns) and float32 scales (rows, 1).

    A file's own e4m3 elements are kept, with the file's scales, or 1 where it has none. Weights in another
    format, or with a scale per block of a row, are widened and quantised anew, on ``device``.

    Raises:
        CorruptCheckpointError: when a scale, or a weight that is quantised here, holds NaN or infinity.
    """
    import torch

    from diffsynth.ops.fp8 import FP8, quantise

    stored, scale = checkpoint.stored(name)
    if stored.dtype == FP8 and (scale is None or scale.ndim in (0, 2)):
        scale = torch.ones(()) if scale is None else scale
        if not bool(torch.isfinite(scale).all()):
            raise CorruptCheckpointError(
                f"The scale of {name} in {checkpoint.source} holds NaN or infinity; the file is damaged."
            )
        rows = scale.expand(stored.shape[0], 1).contiguous()
        return stored.to(device).contiguous(), rows.to(device)
    is_plain = scale is None and stored.dtype.is_floating_point and stored.dtype.itemsize > 1
    # A plain weight moves in its own dtype and is rounded on the device.
    weight = stored.to(device) if is_plain else checkpoint.tensor(name, device, torch.float32)
    return quantise(weight, f"{name} in {checkpoint.source}")


def load_class(match: Match) -> NetworkClass:
    """Import the class of a match.

    Raises:
        UnsupportedModelError: when this version does not build it.
    """
    row = match.architecture
    if row.module is None:
        plan = f" {row.planned_in}" if row.planned_in else ""
        raise UnsupportedModelError(
            f"{match.checkpoint.source} holds {match.needs}: {row.title}. It is recognised, but not built by "
            f"this version.{plan}"
        )
    module, _, name = row.module.partition(":")
    return cast("NetworkClass", getattr(import_module(module), name))


def _check_tensors(match: Match, network: nn.Module, names: Sequence[str]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: match.checkpoint.shapes[name] for name in names}
    faults = {
        "are missing": [name for name in expected if name not in found],
        "belong to no layer": [name for name in found if name not in expected],
        "have another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    for fault, some in faults.items():
        if some:
            raise IncompleteCheckpointError(match.checkpoint.source, match.needs, len(expected), fault, some)

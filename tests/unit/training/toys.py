"""A toy DiT that trains, its inputs, and one training step as short as it gets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.vace import VaceCondition
from diffsynth.models.wan.adapters.vace import VaceAdapter, VaceConfig
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig
from diffsynth.training.objective import FlowMatchObjective

CPU = torch.device("cpu")
CONFIG = DiTConfig(
    dim=48, in_dim=16, out_dim=16, ffn_dim=64, num_layers=4, num_heads=2, freq_dim=32, text_dim=32,
    text_len=64,
)  # fmt: skip
SHAPE = (16, 3, 4, 6)
LARGE = (16, 9, 16, 16)  # tokens enough that inputs of blocks are worth offloading: 576 x 48 x 4 = 110 KB
VACE = VaceConfig(dim=48, ffn_dim=64, num_heads=2, num_vace_blocks=2, vace_layers=(0, 2))


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.named_parameters():
        is_gain = "norm" in name and name.endswith("weight")
        scale = 0.1 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
        tensor.data = torch.randn(tensor.shape, generator=generator) * scale + is_gain
    return network.eval()


def toy_dit(dtype: torch.dtype = torch.float32, config: DiTConfig = CONFIG) -> WanDiT:
    dit = filled(WanDiT(config)).to(dtype)
    assert isinstance(dit, WanDiT)
    return dit


def toy_vace() -> VaceAdapter:
    vace = filled(VaceAdapter(VACE), seed=1)
    assert isinstance(vace, VaceAdapter)
    vace.join(CONFIG)
    return vace


def vace_condition(shape: tuple[int, ...] = SHAPE) -> VaceCondition:
    context = torch.randn(1, VACE.vace_in_dim, *shape[1:], generator=torch.Generator().manual_seed(3))
    return VaceCondition(context=context)


def forward(
    dit: WanDiT, adapters: tuple[VaceAdapter, ...] = (), shape: tuple[int, ...] = SHAPE
) -> tuple[Tensor, Tensor]:
    """The loss of one step and the velocity, (1, C, F, H, W)."""
    objective = FlowMatchObjective()
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 7, CONFIG.text_dim, generator=torch.Generator().manual_seed(2))
    sigma, noise = objective.draw(0, 4, ["a"], shape)
    given = Conditions(text=text, adapters={"vace": vace_condition(shape)} if adapters else {})
    branch = dit.prepare(given, adapters)
    noisy = objective.noisy(latents, noise, sigma)
    [velocity] = dit(noisy, objective.timesteps(sigma, shape[1]), [branch])
    return objective.loss(velocity, latents, noise, sigma), velocity


def step(
    dit: WanDiT,
    trained: Mapping[str, nn.Parameter],
    adapters: tuple[VaceAdapter, ...] = (),
    shape: tuple[int, ...] = SHAPE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    for parameter in trained.values():
        parameter.grad = None
    loss, _ = forward(dit, adapters, shape)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    return loss.detach(), grads


def stir(trained: Mapping[str, nn.Parameter], seed: int = 5) -> None:
    """Numbers for factors that are zero at the start, so that every gradient is there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))

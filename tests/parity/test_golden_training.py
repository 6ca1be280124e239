"""Levels, weights, losses and gradients of a training step against the reference, and against diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.wan.dit import WanDiT
from diffsynth.training.objective import FlowMatchObjective, ObjectiveConfig
from diffsynth.training.recompute import Mode, Recompute
from tests.golden import case
from tests.toys import load_golden_model
from tests.unit.training.toys import CONFIG, SHAPE, toy_dit

STEPS = case("J_training_loss")


@pytest.mark.parametrize("shift", [5, 3])
def test_levels_and_weights_are_the_reference_ones(shift: int) -> None:
    golden = case("G_flowmatch_training")
    objective = FlowMatchObjective(ObjectiveConfig(shift=shift))
    sigmas = torch.tensor([objective.sigma_at(index / 1000) for index in range(1000)])
    golden.assert_close(f"timesteps_shift{shift}", 1000 * sigmas)
    golden.assert_close(f"weights_shift{shift}", objective.weight(sigmas))
    queries = golden.outputs[f"query_timesteps_shift{shift}"] / 1000
    golden.assert_close(f"query_weights_shift{shift}", objective.weight(queries))


def test_each_index_is_told_and_counts_as_in_the_reference() -> None:
    golden = case("J_training_batch_timestep_sampling")
    objective = FlowMatchObjective()
    sigma = torch.tensor([objective.sigma_at(int(i) / 1000) for i in golden.outputs["index"]])
    golden.assert_close("sigma", sigma)
    golden.assert_close("timestep", objective.timesteps(sigma, 1).float())
    golden.assert_close("weight", objective.weight(sigma))


@pytest.mark.parametrize("mode", [None, "full", "keep_attention"])
def test_loss_and_gradients_are_the_reference_ones(mode: Mode | None, tmp_path: Path) -> None:
    dit = load_golden_model(STEPS, "dit", STEPS.config["dit"], tmp_path, "wan_video_dit")
    assert isinstance(dit, WanDiT)
    dit.requires_grad_(True)
    if mode is not None:
        Recompute(mode).install([dit])
    objective = FlowMatchObjective()
    latents, noise, text = (STEPS.inputs[name][None] for name in ("latents", "noise", "context"))
    found: dict[str, list[float]] = {name: [] for name in ("sigma", "weight", "mse", "loss", "grad_norm")}
    for index in STEPS.outputs["index"].tolist():
        sigma = torch.tensor([objective.sigma_at(index / 1000)], dtype=torch.float64)
        noisy = objective.noisy(latents, noise, sigma)
        STEPS.assert_close(f"noisy_{index}", noisy[0])
        dit.zero_grad()
        [velocity] = dit(noisy, objective.timesteps(sigma, 3), [dit.prepare(Conditions(text=text))])
        STEPS.assert_close(f"pred_{index}", velocity[0])
        loss = objective.loss(velocity, latents, noise, sigma)
        loss.backward()
        grads = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
        assert len(grads) == len(list(dit.parameters()))
        for name in (n for n in STEPS.outputs if n.startswith(f"grad_{index}.")):
            STEPS.assert_close(name, grads[name.removeprefix(f"grad_{index}.")])
        plain = FlowMatchObjective(ObjectiveConfig(weighting="none"))
        found["sigma"].append(float(sigma))
        found["weight"].append(float(objective.weight(sigma)))
        found["mse"].append(float(plain.loss(velocity.detach(), latents, noise, sigma)))
        found["loss"].append(float(loss.detach()))
        found["grad_norm"].append(float(torch.stack([g.norm() for g in grads.values()]).norm()))
    for name, values in found.items():
        STEPS.assert_close(name, torch.tensor(values))


def test_gradients_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffsynth.checkpoints.layouts import DIFFUSERS_DIT

    ours = toy_dit().requires_grad_(True)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.dim // CONFIG.num_heads,
        in_channels=16, out_channels=16, text_dim=CONFIG.text_dim, freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.num_layers, cross_attn_norm=True, eps=1e-6,
    )  # fmt: skip
    plan = DIFFUSERS_DIT.inverse().plan(list(ours.state_dict()))
    own = ours.state_dict()
    theirs.load_state_dict({name: own[step.sources[0]] for name, step in plan.items()})
    text = torch.randn(2, CONFIG.text_len, CONFIG.text_dim)
    latents, timestep = torch.randn(2, *SHAPE), torch.tensor([900.0, 300.0])
    weight = torch.randn(2, *SHAPE)
    [velocity] = ours(latents, timestep, [ours.prepare(Conditions(text=text))])
    (velocity * weight).mean().backward()
    expected = theirs(latents, timestep, text).sample
    (expected * weight).mean().backward()
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
    grads = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        grad = grads[plan[name].sources[0]].grad
        assert grad is not None and parameter.grad is not None
        # fp32, the same sums in another order, RoPE there in complex128
        error = (grad.view_as(parameter.grad) - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, f"{name}: {error:.2g}"

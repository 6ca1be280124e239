"""Weights in fp8: what rounding costs, and that a layer computes with exactly what is stored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.errors import ArgumentError, CorruptCheckpointError
from diffsynth.ops.fp8 import FP8, FP8_MAX, Fp8Linear, WideningRoom, quantise, quantise_tokens, widen
from diffsynth.ops.fp8_policy import (
    Fp8Policy,
    choose_fp8_compute,
    fp8_summary,
    put_fp8_layers,
    set_fp8_compute,
)

TINY = torch.finfo(torch.float32).tiny


def fp8_linear(
    num_out: int = 32, num_in: int = 64, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Fp8Linear:
    """A layer of weights of standard deviation 0.05."""
    linear = nn.Linear(num_in, num_out, bias=bias, dtype=dtype)
    layer = Fp8Linear(linear, may_multiply=True)
    layer.weight.data, layer.weight_scale = quantise(torch.randn(num_out, num_in) * 0.05)
    return layer.requires_grad_(False)


def rms_error(rounded: Tensor, exact: Tensor) -> float:
    """Relative, in float64."""
    return float((rounded.double() - exact.double()).norm() / exact.double().norm())


# rounding


@pytest.mark.parametrize("std", [0.01, 1e-5, 30.0])
def test_rounding_costs_the_same_at_every_size_of_weight(std: float) -> None:
    weight = torch.randn(256, 512, dtype=torch.float64) * std
    stored, scale = quantise(weight)
    assert stored.dtype == FP8 and scale.dtype == torch.float32 and scale.shape == (256, 1)
    # 3 bits of mantissa: the step is 1/8 to 1/16 of a value, its rms 1/sqrt(12) of it: 2.65 % over all.
    assert 0.025 < rms_error(stored.double() * scale.double(), weight) <= 0.027


def test_a_scale_per_row_halves_the_error_of_a_plain_cast() -> None:
    weight = torch.randn(256, 512, dtype=torch.float64) * 0.01
    stored, scale = quantise(weight)
    ratio = rms_error(stored.double() * scale.double(), weight) / rms_error(weight.float().to(FP8), weight)
    assert ratio <= 0.5, "0.47 is what the format gives"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_of_a_row_is_kept(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 33).to(dtype).T  # neither contiguous nor of even sizes
    stored, scale = quantise(weight)
    assert stored.is_contiguous() and stored.float().abs().amax(dim=1).eq(FP8_MAX).all()
    largest = weight.float().abs().amax(dim=1)
    assert torch.allclose(widen(stored, scale, torch.float32).abs().amax(dim=1), largest, rtol=1e-6)


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite() -> None:
    weight = torch.randn(4, 16)
    weight[1], weight[2], weight[3] = 0.0, TINY, torch.finfo(torch.float32).max
    stored, scale = quantise(weight)
    wide = widen(stored, scale, torch.float32)
    assert wide.isfinite().all() and (scale > 0).all() and not wide[1].any()
    assert torch.equal(wide[2], weight[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    weight = torch.randn(8, 16, dtype=torch.bfloat16)
    weight[3, 5] = weight[3, 6] = weight[7, 0] = value
    with pytest.raises(CorruptCheckpointError, match=r"blocks\.1\.ffn\.0\.weight .* in 2 of 8 rows"):
        quantise(weight, "blocks.1.ffn.0.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widening_rounds_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsynth.ops.fp8.CPU_PIECE_BYTES", 4 * 24 * 5)  # five rows at a time, and a rest
    stored, scale = quantise(torch.randn(32, 24) * 0.03)
    out = torch.empty(32, 24, dtype=dtype)
    assert widen(stored, scale, dtype, out=out) is out
    assert torch.equal(out, (stored.float() * scale).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_are_rounded_each_in_a_power_of_two(dtype: torch.dtype) -> None:
    x = (torch.randn(6, 512) * torch.tensor([1e-3, 0.1, 1.0, 40.0, 1.0, 1.0]).unsqueeze(1)).to(dtype)
    x[4], x[5, 7] = 0.0, float("nan")
    elements, scale = quantise_tokens(x)
    assert elements.dtype == FP8 and scale.dtype == torch.float32 and scale.shape == (6, 1)
    assert torch.frexp(scale[:5]).mantissa.eq(0.5).all()
    assert elements[:4].float().abs().amax(dim=1).ge(FP8_MAX / 2).all()
    for row in range(4):
        assert rms_error(elements[row].float() * scale[row], x[row]) < 0.028, "as for weights"
    assert not elements[4].float().any() and elements[5].float().isnan().any()


# the layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_a_plain_one_with_the_widened_weight(bias: bool, dtype: torch.dtype) -> None:
    layer, x = fp8_linear(bias=bias), torch.randn(2, 5, 64, dtype=dtype)
    weight = (layer.weight.float() * layer.weight_scale).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert torch.equal(out, F.linear(x, weight, layer.bias.to(dtype) if bias else None))


def test_the_state_is_weight_scale_and_bias_without_gradients() -> None:
    layer = fp8_linear()
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
        "weight": FP8, "weight_scale": torch.float32, "bias": torch.bfloat16,
    }  # fmt: skip
    assert not layer.weight.requires_grad and sum(p.numel() for p in layer.parameters()) == 32 * 64 + 32


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.float, nn.Module.bfloat16])
def test_a_cast_of_the_network_leaves_what_is_stored(cast: object) -> None:
    layer = fp8_linear()
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    cast(layer)  # type: ignore[operator]
    assert layer.weight.dtype == FP8 and torch.equal(layer.weight.float(), weight.float())
    assert torch.equal(layer.weight_scale, scale) and layer.weight_scale.dtype == torch.float32
    layer.to("meta")
    assert layer.weight.is_meta and layer.weight_scale.is_meta


def test_gradients_reach_the_input_past_a_shared_weight() -> None:
    layer, room = fp8_linear(dtype=torch.float32), WideningRoom()
    layer.compute = "fp8"
    room.open([layer])
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    wide = (layer.weight.float() * layer.weight_scale).sum(dim=0)
    assert x.grad is not None and torch.allclose(x.grad, wide.expand(3, -1), atol=1e-6)


def test_the_fp8_product_is_near_the_widened_one() -> None:
    layer, x = fp8_linear(64, 256), torch.randn(2, 24, 256, dtype=torch.bfloat16)
    wide = layer(x)
    layer.compute = "fp8"
    try:
        out = layer(x)
    except RuntimeError as error:
        pytest.skip(f"this torch multiplies no fp8 row by row on a CPU: {error}")
    assert out.shape == wide.shape and out.dtype == torch.bfloat16
    # The tokens' rounding alone: 2.65 % of each term, and of a sum of terms of both signs.
    assert 0.01 < rms_error(out, wide) < 0.035


@pytest.mark.gpu
def test_a_card_multiplies_fp8() -> None:
    device = torch.device("cuda")
    if choose_fp8_compute(device, "fp8")[0] != "fp8":
        pytest.skip(choose_fp8_compute(device, "fp8")[1])
    layer, x = fp8_linear(256, 512), torch.randn(3, 100, 512, dtype=torch.bfloat16)
    wide = layer(x)
    layer.to(device).compute = "fp8"
    assert 0.01 < rms_error(layer(x.to(device)).cpu(), wide) < 0.035


# which layers, and how they multiply


class Toy(nn.Module):
    fp8_policy = Fp8Policy(num_edge_blocks=1, multiplies=("ffn.",))

    def __init__(self, num_blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(width, width),
                    "norm": nn.LayerNorm(width),
                    "ffn": nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width, bias=False)),
                }
            )
            for _ in range(num_blocks)
        )


def test_a_policy_names_the_layers_of_inner_blocks() -> None:
    network = Toy()
    assert put_fp8_layers(network) == ["blocks.1.q", "blocks.1.ffn.0", "blocks.1.ffn.2"]
    fp8 = {name: m.may_multiply for name, m in network.named_modules() if isinstance(m, Fp8Linear)}
    assert fp8 == {"blocks.1.q": False, "blocks.1.ffn.0": True, "blocks.1.ffn.2": True}
    assert [type(m) for m in network.blocks[1]["ffn"]] == [Fp8Linear, nn.GELU, Fp8Linear]
    assert network.blocks[1]["ffn"][2].bias is None
    assert put_fp8_layers(Toy(num_blocks=2)) == put_fp8_layers(Toy(num_blocks=1)) == []
    assert put_fp8_layers(nn.Sequential(nn.Linear(4, 4))) == [], "no policy"


def test_sizes_that_the_fp8_product_does_not_take_are_widened() -> None:
    network = Toy(width=40)
    put_fp8_layers(network)
    assert not any(m.may_multiply for m in network.modules() if isinstance(m, Fp8Linear))


def test_fp8_products_are_asked_for_and_need_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    network, cpu, card = Toy(), torch.device("cpu"), torch.device("cuda")
    put_fp8_layers(network)
    assert choose_fp8_compute(cpu) == ("widened", "cpu has no fast fp8 product")
    with pytest.raises(ArgumentError, match=r"fp8_compute is 'fp8', but cpu has no .* Use 'widened'"):
        set_fp8_compute(network, cpu, "fp8")
    with pytest.raises(ArgumentError, match="give 'widened', 'fp8' or None"):
        set_fp8_compute(network, cpu, "int8")  # type: ignore[arg-type]
    monkeypatch.setattr("diffsynth.ops.fp8_policy._refusal", lambda device: None)
    assert choose_fp8_compute(card)[0] == "widened" and "the default" in choose_fp8_compute(card)[1]
    assert fp8_summary(network) == "3 Linear layers in fp8 (e4m3, per row), widened to multiply"
    assert set_fp8_compute(network, card, "fp8") == "asked for"
    assert [m.compute for m in network.modules() if isinstance(m, Fp8Linear)] == ["widened", "fp8", "fp8"]
    assert "2 multiply in fp8, the others are widened" in str(fp8_summary(network))
    set_fp8_compute(network, card, "widened")
    assert "widened to multiply" in str(fp8_summary(network)) and fp8_summary(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("capability", "error", "reason"),
    [
        pytest.param((8, 0), None, "X has compute capability 8.0; fp8 products need 8.9", id="ampere"),
        pytest.param(
            (9, 0), "no row-wise\nmore", "refuses row-wise fp8 products on X (no row-wise)", id="torch"
        ),
        pytest.param((9, 0), None, "asked for", id="hopper"),
    ],
)
def test_a_card_is_asked_whether_it_can(
    capability: tuple[int, int], error: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffsynth.ops import fp8_policy

    def multiply(self: Fp8Linear, x: Tensor) -> Tensor:
        if error:
            raise RuntimeError(error)
        return x

    card = type("Card", (), {"type": "cuda"})()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8_policy, "_try_product", lambda device: multiply(fp8_linear(), torch.ones(1)))
    compute, why = choose_fp8_compute(card, "fp8")
    assert why.endswith(reason) and compute == ("fp8" if reason == "asked for" else "widened")

"""What trains, against PEFT and against plain loops; what is left behind; what is written."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.errors import ArgumentError, IncompleteCheckpointError, LoRAError
from diffsynth.lora.attach import Dial, LoRALinear, attach, twice
from diffsynth.lora.formats import open_loras
from diffsynth.lora.matching import Network, fit
from diffsynth.models.wan.dit import WanDiT
from diffsynth.training.factors import factorised
from diffsynth.training.masters import rounded_by_chance
from diffsynth.training.tuning import DEFAULT_TARGETS, TuneConfig, Tuned, tune
from tests.unit.training.toys import forward, step, stir, toy_dit, toy_vace

LORA = TuneConfig(rank=4, alpha=2.0)


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_outputs_and_gradients_are_those_of_peft(is_dora: bool) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = toy_dit(), toy_dit()
    tuned = tune(ours, (), TuneConfig(kind="dora" if is_dora else "lora", rank=4, alpha=2.0))
    config = peft.LoraConfig(r=4, lora_alpha=2.0, target_modules=list(DEFAULT_TARGETS), use_dora=is_dora)
    peft.inject_adapter_in_model(config, theirs)
    wanted = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    assert wanted.keys() == tuned.parameters().keys()
    for name, p in tuned.parameters().items():  # a DoRA begins with the same lengths
        if "magnitude" in name:
            torch.testing.assert_close(wanted[name], p)
    stir(tuned.parameters())
    for name, p in tuned.parameters().items():
        wanted[name].data.copy_(p.data)
    loss, grads = step(ours, tuned.parameters())
    their_loss, their_grads = step(theirs, wanted)
    # fp32, the same sums in another order
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    for name, grad in their_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_gradients_are_those_of_a_plain_loop() -> None:
    dit, plain = toy_dit(), toy_dit()
    tuned = tune(dit, (), LORA)
    stir(tuned.parameters())
    optimizer = torch.optim.AdamW(tuned.parameters().values(), lr=1e-2)
    copies = {name: p.detach().clone().requires_grad_(True) for name, p in tuned.parameters().items()}
    other = torch.optim.AdamW(copies.values(), lr=1e-2)
    plain.requires_grad_(False)
    for name, layer in list(plain.named_modules()):
        if f"{name}.lora_A.default.weight" in copies:
            down, up = (copies[f"{name}.lora_{part}.default.weight"] for part in "AB")
            layer.register_forward_hook(
                lambda _, x, y, down=down, up=up: y + 2.0 / 4 * F.linear(F.linear(x[0], down), up)
            )
    for _ in range(3):
        loss, grads = step(dit, tuned.parameters())
        expected, wanted = step(plain, copies)
        assert torch.equal(loss, expected)
        assert all(torch.equal(grads[name], grad) for name, grad in wanted.items())  # the same kernels
        optimizer.step()
        other.step()


def test_lokr_is_the_kronecker_product_of_its_factors() -> None:
    dit, plain = toy_dit(), toy_dit()
    tuned = tune(dit, (), TuneConfig(kind="lokr", rank=2, alpha=1.0, targets=("q", "ffn.0"), factor=4))
    assert torch.equal(forward(dit)[1], forward(plain)[1]), "nothing is changed at the start"
    stir(tuned.parameters())
    copies = {name: p.detach().clone().requires_grad_(True) for name, p in tuned.parameters().items()}
    plain.requires_grad_(False)
    for name, layer in list(plain.named_modules()):
        if f"{name}.lokr_w1" in copies:
            w1, a, b = (copies[f"{name}.lokr_{part}"] for part in ("w1", "w2_a", "w2_b"))
            layer.register_forward_hook(
                lambda _, x, y, w=(w1, a, b): y + 0.5 * F.linear(x[0], torch.kron(w[0], w[1] @ w[2]))
            )
    loss, grads = step(dit, tuned.parameters())
    expected, wanted = step(plain, copies)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # fp32, another order of sums
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_detach_gives_the_very_layers_back(kind: str) -> None:
    dit = toy_dit()
    layers, velocity = dict(dit.named_modules()), forward(dit)[1]
    tuned = tune(dit, (), TuneConfig(kind=kind, rank=4))  # type: ignore[arg-type]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in tuned.parameters().values())
    trains = {id(p) for p in dit.parameters() if p.requires_grad}
    assert trains == {id(p) for p in tuned.parameters().values()}
    stir(tuned.parameters())
    assert not torch.equal(forward(dit)[1], velocity)
    tuned.detach()
    assert {n: id(m) for n, m in dit.named_modules()} == {n: id(m) for n, m in layers.items()}
    assert all(p.requires_grad for p in dit.parameters()), "as it was"
    assert torch.equal(forward(dit)[1], velocity)


def test_targets_by_name_and_regex_and_in_adapters() -> None:
    dit, vace = toy_dit(), toy_vace()
    targets = ("o", r"re:blocks\.[01]\.self_attn\.q", "time_projection.1", "head.head", "after_proj")
    tuned = tune(dit, (vace,), TuneConfig(rank=2, targets=targets, networks=("dit", "adapters")))
    layers = {name.partition(".lora_")[0] for name in tuned.parameters()}
    assert {"blocks.0.self_attn.q", "blocks.1.self_attn.q", "time_projection.1", "head.head"} <= layers
    assert "blocks.2.self_attn.q" not in layers
    assert {"vace_blocks.1.after_proj", "vace_blocks.0.cross_attn.o"} <= layers
    stir(tuned.parameters())
    _, grads = step(dit, tuned.parameters(), (vace,))
    assert all(bool(grads[name].abs().max() > 0) for name in tuned.parameters())
    with pytest.raises(ArgumentError, match="ends in qq, re:nothing"):
        tune(toy_dit(), (), TuneConfig(targets=("q", "qq", "re:nothing")))
    with pytest.raises(ArgumentError, match="no 'vace' to train; loaded: dit"):
        tune(toy_dit(), (), TuneConfig(networks=("vace",)))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_factors_are_drawn_as_peft_draws_them_and_from_the_seed(init: str) -> None:
    def drawn(seed: int) -> Tensor:
        tuned = tune(toy_dit(), (), TuneConfig(rank=8, init=init, seed=seed))  # type: ignore[arg-type]
        return torch.cat(
            [p.flatten() for n, p in tuned.parameters().items() if n.endswith("ffn.0.lora_A.default.weight")]
        )

    first = drawn(0)
    assert torch.equal(first, drawn(0)) and not torch.equal(first, drawn(1))
    deviation = 48**-0.5 / 3**0.5 if init == "kaiming" else 1 / 8  # peft: uniform to 1 / sqrt(K); 1 / r
    assert float(first.detach().std()) == pytest.approx(deviation, rel=0.05)  # of 1536 draws


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
def test_bf16_weights_learn_from_updates_below_their_rounding(rounding: str) -> None:
    dit = toy_dit(torch.bfloat16)
    start = {name: p.detach().clone() for name, p in dit.named_parameters()}
    tuned = tune(dit, (), TuneConfig(kind="full", rounding=rounding))  # type: ignore[arg-type]
    assert tuned.parameters().keys() == start.keys()
    own = tuned.parameters() if tuned.rounding is None else tuned.rounding.parameters()
    optimizer = torch.optim.SGD(own.values(), lr=1.0)
    for index in range(40):
        for name, p in tuned.parameters().items():
            p.grad = (start[name] * 2.0**-11).to(p.dtype)  # a quarter of what rounding to nearest keeps
        if tuned.rounding is None:
            optimizer.step()
        else:
            tuned.rounding.step(optimizer.step, seed=0, step=index)
            assert all(p.grad is None for p in tuned.parameters().values())
    tuned.detach()
    assert {name: p.dtype for name, p in dit.named_parameters()} == {n: t.dtype for n, t in start.items()}
    shares = [(p.float() / start[name].float()).flatten() for name, p in dit.named_parameters()]
    # 90,000 numbers, each rounded 40 times by chance: a deviation of 3e-5
    assert float(torch.cat(shares).detach().nanmean()) == pytest.approx(1 - 40 * 2.0**-11, abs=3e-4)


def test_masters_are_read_in_the_networks_dtype() -> None:
    dit = toy_dit(torch.bfloat16)
    expected = forward(dit)[1]
    tuned = tune(dit, (), TuneConfig(kind="full"))
    assert dit.dtype == torch.bfloat16 and torch.equal(forward(dit)[1], expected)
    _, grads = step(dit, tuned.parameters())
    assert len(grads) == len(tuned.parameters()) and all(g.dtype == torch.float32 for g in grads.values())


def test_rounding_by_chance_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor([1.0, 1.001, -3.007, 1e-30, float("inf"), float("nan")])
    rounded = rounded_by_chance(numbers.repeat(20_000, 1), generator).float()
    # a bf16 step is 2^-7 of these, its share of a mean of 20,000 draws 3e-5
    torch.testing.assert_close(rounded[:, :4].double().mean(0), numbers[:4].double(), rtol=2e-4, atol=0)
    assert rounded[0, 4] == float("inf") and rounded[0, 5].isnan() and (rounded[:, 0] == 1).all()


def test_named_parts_train_alone() -> None:
    dit, vace = toy_dit(), toy_vace()
    tuned = tune(dit, (vace,), TuneConfig(kind="parts", parts=("vace", r"re:.*norm_q\.weight")))
    names = set(tuned.parameters())
    assert "vace_patch_embedding.weight" in names and "blocks.3.cross_attn.norm_q.weight" in names
    assert "blocks.0.self_attn.q.weight" not in names
    assert not dit.blocks[0].self_attn.q.weight.requires_grad
    with pytest.raises(ArgumentError, match="No tensor's name matches 'nothing'"):
        tune(dit, (vace,), TuneConfig(kind="parts", parts=("re:nothing",)))


def test_a_fresh_dit_is_drawn_from_the_seed_and_keeps_nothing_of_its_file() -> None:
    drawn = []
    for seed in (0, 0, 1):
        dit = toy_dit()
        before = {name: p.clone() for name, p in dit.named_parameters()}
        tune(dit, (), TuneConfig(kind="full", fresh=True, seed=seed))
        drawn.append(dict(dit.named_parameters()))
        matrices = [name for name, p in drawn[-1].items() if p.ndim > 1]
        assert not any(torch.equal(before[name], drawn[-1][name]) for name in matrices)
    first, same, other = drawn
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["blocks.0.ffn.0.weight"], other["blocks.0.ffn.0.weight"])
    assert not first["head.head.weight"].any()


def test_state_goes_into_the_same_run_and_into_no_other() -> None:
    dit = toy_dit()
    tuned = tune(dit, (), LORA)
    stir(tuned.parameters())
    state = {name: t.clone() for name, t in tuned.state_dict().items()}
    assert "blocks.0.self_attn.q.lora_A.default.weight" in state
    other = toy_dit()
    again = tune(other, (), LORA)
    again.load_state_dict(state)
    assert torch.equal(forward(other)[1], forward(dit)[1])
    for config, fault in (
        (TuneConfig(rank=8), "another shape"),
        (TuneConfig(rank=4, targets=("q",)), "do not train here"),
    ):
        with pytest.raises(IncompleteCheckpointError, match=fault):
            tune(toy_dit(), (), config).load_state_dict(state)


def loaded(path: Path) -> WanDiT:
    """A fresh toy with an exported LoRA beside it."""
    dit = toy_dit()
    shapes = {name: tuple(t.shape) for name, t in dit.state_dict().items()}
    [lora] = open_loras(path, {name.rpartition(".")[0] for name in shapes})
    [changes], missing = fit(lora, [Network(title="toy", source="", shapes=shapes)])
    assert not missing
    originals = {name: t.float() for name, t in dit.state_dict().items()}
    attach(dit, changes, Dial("loaded"), originals)
    return dit


def exported(tmp_path: Path, config: TuneConfig, export_format: str) -> tuple[WanDiT, Tuned, Path]:
    dit = toy_dit()
    tuned = tune(dit, (), config)
    stir(tuned.parameters())
    path = tuned.export(tmp_path / "lora.safetensors", export_format, {"modelspec.title": "a"})
    return dit, tuned, path


@pytest.mark.parametrize("export_format", ["comfy", "kohya", "diffusers", "peft"])
def test_exports_load_as_trained(export_format: str, tmp_path: Path) -> None:
    dit, _, path = exported(tmp_path, LORA, export_format)
    # fp32; where alpha is folded into B, rounded once more
    torch.testing.assert_close(forward(loaded(path))[1], forward(dit)[1], rtol=1e-5, atol=1e-5)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "a" and metadata["ss_network_alpha"] == "2"


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_kinds_load_as_trained_from_comfys_names(kind: str, tmp_path: Path) -> None:
    config = TuneConfig(kind=kind, rank=4, alpha=2.0)  # type: ignore[arg-type]
    dit, tuned, path = exported(tmp_path, config, "comfy")
    torch.testing.assert_close(forward(loaded(path))[1], forward(dit)[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(LoRAError, match="no names"):
        tuned.export(tmp_path / "b.safetensors", "diffusers")


def test_diffusers_reads_its_export_with_its_alpha(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    _, tuned, path = exported(tmp_path, LORA, "diffusers")
    assert not any(name.endswith(".alpha") for name in load_file(path))
    peer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=32, ffn_dim=64, num_layers=4,
    )  # fmt: skip
    peer.load_lora_adapter(
        str(path.parent), weight_name=path.name, prefix="transformer", use_safetensors=True
    )
    layers = [m for m in peer.modules() if hasattr(m, "scaling") and m.scaling]
    assert len(layers) == len(tuned.parameters()) // 2
    assert {scale for layer in layers for scale in layer.scaling.values()} == {0.5}


def test_lora_file_may_be_the_start(tmp_path: Path) -> None:
    dit, _, path = exported(tmp_path, LORA, "comfy")
    other = toy_dit()
    tuned = tune(other, (), TuneConfig(rank=4, alpha=8.0))
    tuned.start_from(open_loras(path)[0])
    torch.testing.assert_close(forward(other)[1], forward(dit)[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(LoRAError, match="expected a LoRA of rank 8"):
        tune(toy_dit(), (), TuneConfig(rank=8)).start_from(open_loras(path)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_export_is_the_whole_network_under_official_names(dtype: torch.dtype, tmp_path: Path) -> None:
    dit = toy_dit(dtype)
    names = {name: (tuple(t.shape), t.dtype) for name, t in dit.state_dict().items()}
    tuned = tune(dit, (), TuneConfig(kind="parts", parts=(r"re:blocks\.0\..*",)))
    stir(tuned.parameters())
    tuned.export(tmp_path / "full.safetensors")
    stored = load_file(tmp_path / "full.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == names
    plain = toy_dit(dtype)
    plain.load_state_dict(stored)
    assert torch.equal(forward(plain)[1], forward(dit)[1])


def test_factors_train_beside_fp8() -> None:
    from benchmarks.gpu.fp8 import store_in_fp8

    dit = toy_dit(torch.bfloat16)
    store_in_fp8(dit)
    widened = copy.deepcopy(dit)
    for name, layer in list(widened.named_modules()):
        if hasattr(layer, "widened"):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16)
            linear.weight.data, linear.bias.data = layer.widened(torch.bfloat16), layer.bias.data
            widened.set_submodule(name, linear)
    results = []
    for network in (dit, widened):
        tuned = tune(network, (), TuneConfig(kind="dora", rank=4))
        results.append(step(network, tuned.parameters()))
        assert any(isinstance(m, LoRALinear) for m in network.modules())
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[1][1].items():
        # bf16: the lengths are those of the fp8 weight before its rounding to bf16
        torch.testing.assert_close(results[0][1][name], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()))
    with pytest.raises(ArgumentError, match="kept in fp8, which cannot train"):
        tune(dit, (), TuneConfig(kind="full"))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"kind": "loha"}, "known: lora, dora"),
        ({"rank": 0}, "lora_rank is 0"),
        ({"alpha": 0.0}, "lora_alpha is 0.0"),
        ({"targets": ()}, "targets is empty"),
        ({"parts": ("vace",)}, "no other kind reads them"),
        ({"kind": "parts"}, "needs parts"),
    ],
)
def test_wrong_configurations_say_what_to_give(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        TuneConfig(**wrong)  # type: ignore[arg-type]


def test_sizes_split_as_square_as_they_go() -> None:
    assert factorised(5120, None) == (64, 80) and factorised(5120, 16) == (16, 320)
    assert factorised(13824, 8) == (8, 1728) and factorised(7, None) == (1, 7)


def test_checkpoint_class_reads_an_export(tmp_path: Path) -> None:
    _, _, path = exported(tmp_path, LORA, "comfy")
    assert all(name.startswith("diffusion_model.blocks.") for name in Checkpoint.open(path).shapes)


def test_a_layer_and_its_branch_share_their_input_and_the_memory_of_its_gradient() -> None:
    x = torch.randn(3, 24).requires_grad_()
    layer, branch = torch.randn(40, 24), torch.randn(40, 24)
    own, beside = twice(x)
    (F.linear(own, layer) + F.linear(beside, branch)).sum().backward()
    assert own.data_ptr() == beside.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x.grad, (layer.sum(0) + branch.sum(0)).expand(3, -1))

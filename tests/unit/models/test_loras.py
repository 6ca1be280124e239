"""LoRAs on a manager's networks: fused, attached, changed, taken away; and every wrong file told as such."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.vace import VaceCondition
from diffsynth.errors import ArgumentError, CheckpointError, LoRAError, LoRAFileError
from diffsynth.lora.attach import Dial, LoRALinear, attach, attached_layers, fresh_changes
from diffsynth.lora.changes import LowRank, delta
from diffsynth.lora.names import flat
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.dit import WanDiT
from diffsynth.ops.fp8 import FP8, Fp8Linear
from tests.golden import case
from tests.toys import TOY_DIT, write_checkpoint, write_toy_dit
from tests.unit.lora.files import comfy_file, drawn, pair, read, write

CONFIG = replace(TOY_DIT, num_layers=4)
D, H = CONFIG.dim, CONFIG.ffn_dim
SIZES = {
    "self_attn.q": (D, D), "self_attn.o": (D, D), "cross_attn.k": (D, D), "cross_attn.v": (D, D),
    "ffn.0": (H, D), "ffn.2": (D, H),
}  # fmt: skip
LAYERS = {f"blocks.{i}.{name}": size for i in range(4) for name, size in SIZES.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT, and LoRAs for it: plain ones, one of every kind of key, one with DoRA."""
    folder = tmp_path_factory.mktemp("loras")
    torch.manual_seed(0)
    write_toy_dit(folder / "dit.safetensors", config=CONFIG)
    comfy_file(folder / "style.safetensors", LAYERS)
    comfy_file(folder / "motion.v2.safetensors", LAYERS, rank=2)
    start = "diffusion_model."
    around = {"head.head": (64, D), "time_embedding.0": (D, 32), "time_projection.1": (6 * D, D),
              "text_embedding.0": (D, 32), "text_embedding.2": (D, D)}  # fmt: skip
    keys = load_file(comfy_file(folder / "tmp.safetensors", {**around, "blocks.1.ffn.0": (H, D)}))
    shapes = {
        "blocks.0.self_attn.norm_q.diff": (D,), "blocks.2.diff_m": (1, 6, D), "blocks.0.norm3.diff": (D,),
        "blocks.0.norm3.diff_b": (D,), "head.diff_m": (1, 2, D), "blocks.3.ffn.2.diff_b": (D,),
        "blocks.3.ffn.2.diff": (D, H), "patch_embedding.lora_down.weight": (2, 16, 1, 2, 2),
        "patch_embedding.lora_up.weight": (D, 2, 1, 1, 1), "patch_embedding.diff_b": (D,),
        "blocks.1.self_attn.v.hada_w1_a": (D, 3), "blocks.1.self_attn.v.hada_w1_b": (3, D),
        "blocks.1.self_attn.v.hada_w2_a": (D, 3), "blocks.1.self_attn.v.hada_w2_b": (3, D),
        "blocks.1.self_attn.k.lokr_w1": (4, 4), "blocks.1.self_attn.k.lokr_w2": (12, 12),
    }  # fmt: skip
    keys |= {start + name: drawn(*shape) for name, shape in shapes.items()}
    keys[f"{start}blocks.1.self_attn.k.alpha"] = torch.tensor(1.0)
    write(folder / "every.safetensors", keys)
    shapes = {
        "blocks.1.self_attn.q.lora_A.weight": (4, D), "blocks.1.self_attn.q.lora_B.weight": (D, 4),
        "blocks.2.ffn.2.lora_A.weight": (4, H), "blocks.2.ffn.2.lora_B.weight": (D, 4),
    }  # fmt: skip
    dora = {start + name: drawn(*shape) for name, shape in shapes.items()}
    dora[f"{start}blocks.1.self_attn.q.dora_scale"] = drawn(D, 1).abs() + 0.5  # a length for each row
    dora[f"{start}blocks.2.ffn.2.dora_scale"] = drawn(1, H).abs() + 0.5  # for each column
    write(folder / "dora.safetensors", dora)
    return folder


def manager_of(folder: Path, dtype: torch.dtype | None = torch.float32) -> tuple[ModelManager, WanDiT]:
    manager = ModelManager(dtype, "cpu").load_models([folder / "dit.safetensors"])
    dit = manager.fetch_model("wan_video_dit")
    assert isinstance(dit, WanDiT)
    return manager, dit


def velocity(dit: WanDiT) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(1, 7, CONFIG.text_dim, generator=generator)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    with torch.no_grad():
        return dit(latents, torch.tensor([600.0]), [dit.prepare(Conditions(text=text))])[0]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same(network: nn.Module, before: dict[str, Tensor]) -> None:
    after = network.state_dict()
    assert after.keys() == before.keys()
    different = [n for n in after if not torch.equal(after[n].view(torch.uint8), before[n].view(torch.uint8))]
    assert not different


@pytest.mark.parametrize("name", ["style", "every", "dora"])
def test_attached_equals_fused(name: str, files: Path) -> None:
    results = {}
    for mode in ("fuse", "attach"):
        manager, dit = manager_of(files)
        plain = velocity(dit)
        [report] = manager.load_lora(files / f"{name}.safetensors", 0.8, mode=mode)  # type: ignore[arg-type]
        assert not report.missing and report.num_keys_read == report.lora.num_keys
        results[mode] = velocity(dit)
        assert (results[mode] - plain).abs().max() > 1e-3
    assert (results["fuse"] - results["attach"]).norm() <= 1e-5 * results["fuse"].norm()


@pytest.mark.parametrize("mode", ["fuse", "attach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_unloading_restores_the_very_weights(mode: str, dtype: torch.dtype, files: Path) -> None:
    manager, dit = manager_of(files, dtype)
    before, modules = state(dit), dict(dit.named_modules())
    plain = velocity(dit)
    for name in ("style", "every", "dora"):
        manager.load_lora(files / f"{name}.safetensors", mode=mode)  # type: ignore[arg-type]
    assert not torch.equal(velocity(dit), plain)
    manager.unload_lora("every")
    manager.unload_lora()
    assert_same(dit, before)
    assert dict(dit.named_modules()) == modules and all(
        type(m) is type(modules[n]) for n, m in dit.named_modules()
    )
    assert torch.equal(velocity(dit), plain)


def test_fusing_writes_into_no_file_and_no_other_network(files: Path) -> None:
    manager, _ = manager_of(files)
    _, twin = manager_of(files)
    before, content = state(twin), (files / "dit.safetensors").read_bytes()
    manager.load_lora(files / "style.safetensors")
    assert_same(twin, before)
    assert (files / "dit.safetensors").read_bytes() == content
    assert all(torch.equal(e.match.checkpoint.tensor(n), before[n]) for e in manager.loaded for n in before)


def test_several_at_once_do_not_depend_on_their_order(files: Path) -> None:
    names = ["style", "motion.v2"]
    results = []
    for order in (names, names[::-1]):
        manager, dit = manager_of(files)
        manager.load_lora([files / f"{name}.safetensors" for name in order], 0.5)
        manager.set_lora("style", 1.0)
        results.append(velocity(dit))
        manager.unload_lora("style")
        alone, dit2 = manager_of(files)
        alone.load_lora(files / "motion.v2.safetensors", 0.5)
        assert_same(dit2, state(dit))
    assert torch.allclose(*results, atol=1e-6)


@pytest.mark.parametrize("mode", ["fuse", "attach"])
def test_strength_off_and_on_again(mode: str, files: Path) -> None:
    manager, dit = manager_of(files)
    plain = velocity(dit)
    manager.load_lora(files / "every.safetensors", 0.5, name="a", mode=mode)  # type: ignore[arg-type]
    half = velocity(dit)
    manager.set_lora("a", 1.0)
    full = velocity(dit)
    manager.disable_lora("a")
    assert torch.equal(velocity(dit), plain)
    manager.set_lora("a", 0.5)
    assert torch.equal(velocity(dit), half) and not torch.equal(half, full)


def test_fp8_attached_is_the_fp8_model_plus_the_exact_change(files: Path) -> None:
    manager, dit = manager_of(files, FP8)
    layer = dit.get_submodule("blocks.1.ffn.0")
    assert isinstance(layer, Fp8Linear)
    x = torch.randn(3, D)
    base, stored = layer(x), layer.weight.clone()
    manager.load_lora(files / "style.safetensors", 0.7, mode="attach")
    wrapped = dit.get_submodule("blocks.1.ffn.0")
    assert isinstance(wrapped, LoRALinear) and wrapped.base is layer
    assert torch.equal(layer.weight.view(torch.uint8), stored.view(torch.uint8))
    change = read(files / "style.safetensors").layers["blocks.1.ffn.0"].weight
    assert isinstance(change, LowRank)
    rounded = LowRank(change.down.bfloat16().float(), change.up.bfloat16().float())
    expected = base + 0.7 * x @ delta(rounded, torch.zeros(H, D)).T
    assert torch.allclose(wrapped(x), expected, atol=1e-5)


def test_fp8_fused_is_quantised_from_the_files_own_numbers(files: Path) -> None:
    manager, dit = manager_of(files, FP8)
    manager.load_lora(files / "style.safetensors", 0.7)
    layer = dit.get_submodule("blocks.1.ffn.0")
    assert isinstance(layer, Fp8Linear)
    exact, wide = manager_of(files)
    exact.load_lora(files / "style.safetensors", 0.7)
    weight = wide.get_submodule("blocks.1.ffn.0").weight
    assert isinstance(weight, Tensor)
    error = (layer.widened(torch.float32) - weight).norm() / weight.norm()
    assert error < 0.03  # an e4m3 number with a scale per row errs by 2.7 %, see ops/fp8.py


@pytest.mark.parametrize("rounds", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_rounds_of_loading_leave_nothing_behind(rounds: int, files: Path) -> None:
    manager, _ = manager_of(files)

    def tensors_there() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]

    # Those of earlier tests go when they like.
    earlier = {id(tensor): ref(tensor) for tensor in tensors_there()}

    def living() -> tuple[int, int]:
        tensors = [t for t in tensors_there() if id(t) not in earlier or earlier[id(t)]() is not t]
        return len(tensors), sum(
            t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values()
        )

    counts = []
    for round_ in range(rounds):
        manager.load_lora(files / "every.safetensors", mode="attach" if round_ % 2 else "fuse")
        manager.unload_lora()
        counts.append(living())
    assert counts[1] == counts[-1], counts


def test_a_schedule_needs_an_attached_lora(files: Path) -> None:
    manager, dit = manager_of(files)
    manager.load_lora(files / "style.safetensors", name="fused")
    with pytest.raises(ArgumentError, match="mode='attach'"):
        manager.set_lora("fused", [1.0, 0.0])
    manager.load_lora(files / "style.safetensors", name="beside", mode="attach")
    manager.set_lora("beside", [1.0, 0.0, 0.5])
    with pytest.raises(ArgumentError, match="3 strengths and this call has 4 steps"):
        manager.loras.begin(4)
    manager.loras.begin(3)
    first = velocity(dit)
    assert manager.loras.advance(1)
    second = velocity(dit)
    assert manager.loras.advance(2) and not manager.loras.advance(2)
    manager.set_lora("beside", 0.5)
    third = velocity(dit)
    manager.disable_lora("beside")
    assert torch.equal(second, velocity(dit)) and not torch.equal(first, third)


def test_what_fitted_and_what_did_not_is_said(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = load_file(files / "style.safetensors")
    for name in ("k_img", "v_img"):
        down, up = pair(D, D)
        keys |= {f"diffusion_model.blocks.0.cross_attn.{name}.lora_A.weight": down,
                 f"diffusion_model.blocks.0.cross_attn.{name}.lora_B.weight": up}  # fmt: skip
    keys["diffusion_model.blocks.0.cam_encoder.weight"] = drawn(3, 3)
    manager, _ = manager_of(files)
    with caplog.at_level(logging.INFO, logger="diffsynth"):
        [report] = manager.load_lora(write(files / "i2v.safetensors", keys))
    text = caplog.records[-1].getMessage()
    assert text == str(report) and caplog.records[-1].levelno == logging.WARNING and "\n" not in text
    assert "Wan2.1 I2V LoRA 'i2v' (comfy, rank 4) fused into 24 layers of wan_video_dit, strength 1" in text
    assert "48 of 53 keys used" in text
    assert "4 of 53 keys are for image cross-attention, which this model lacks" in text
    assert "1 of 53 keys are no part of a LoRA (diffusion_model.blocks.0.cam_encoder.weight)" in text


def test_wrong_files_are_told_as_such(files: Path, tmp_path: Path) -> None:
    manager, dit = manager_of(files)
    before = state(dit)
    other = comfy_file(
        tmp_path / "other.safetensors", {"blocks.0.self_attn.q": (64, 64), "blocks.7.ffn.0": (9, 64)}
    )
    with pytest.raises(LoRAError, match=r"another size.*64 x 64 \(8 blocks\).*48 x 48 \(4 blocks\)"):
        manager.load_lora(other)
    with pytest.raises(LoRAError, match=r"is a model \(wan_video_dit \(t2v\)\), not a LoRA"):
        manager.load_lora(files / "dit.safetensors")
    with pytest.raises(LoRAFileError, match="is a LoRA"):
        manager.load_models([files / "style.safetensors"])
    with pytest.raises(LoRAError, match="none is a LoRA's"):
        manager.load_lora(write(tmp_path / "strange.safetensors", {"a": drawn(2)}))
    vace = comfy_file(tmp_path / "vace.safetensors", {"vace_blocks.0.before_proj": (D, D)})
    with pytest.raises(LoRAError, match=r"none of its 2 keys fits.*VACE layers, which are not loaded"):
        manager.load_lora(vace)
    broken = load_file(files / "style.safetensors")
    next(iter(broken.values()))[0, 0] = torch.nan
    with pytest.raises(LoRAError, match="NaN"):
        manager.load_lora(write(tmp_path / "broken.safetensors", broken))
    with pytest.raises(LoRAError, match="no manager holds a DiT"):
        ModelManager(torch.float32, "cpu").load_lora(files / "style.safetensors")
    assert_same(dit, before)
    assert manager.loras.names == []


@pytest.mark.parametrize("mode", ["fuse", "attach"])
def test_one_lora_loaded_twice_adds_twice(mode: str, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    style = files / "style.safetensors"
    manager, dit = manager_of(files)
    before = state(dit)
    manager.load_lora(style, 0.75, mode=mode)  # type: ignore[arg-type]
    expected = velocity(dit)
    manager.unload_lora()
    for weight in (0.5, 0.25):
        manager.load_lora(style, weight, mode=mode)  # type: ignore[arg-type]
    assert manager.loras.names == ["style", "style-2"]
    assert [line for line in caplog.messages if "adds to it, as 'style-2'" in line]
    assert (velocity(dit) - expected).norm() <= 1e-5 * expected.norm()
    manager.unload_lora()
    assert_same(dit, before)


@pytest.mark.parametrize("mode", ["fuse", "attach"])
def test_tensors_in_memory_are_a_lora_as_a_file_is(mode: str, files: Path) -> None:
    results = []
    for given in ({"file_path": files / "every.safetensors"}, {"file_path": "", "state_dict": 1}):
        manager, dit = manager_of(files)
        if "state_dict" in given:
            given["state_dict"] = load_file(files / "every.safetensors")
        [report] = manager.load_lora(**given, lora_alpha=0.8, mode=mode)  # type: ignore[arg-type]
        assert not report.missing
        results.append(velocity(dit))
    assert torch.equal(*results) and manager.loras.names == ["state_dict"]
    with pytest.raises(CheckpointError, match=r"holds 'state_dict': dict.*state\['state_dict'\]"):
        manager.load_lora(state_dict={"state_dict": load_file(files / "every.safetensors")})  # type: ignore[dict-item]


def test_wrong_arguments_say_what_to_give(files: Path) -> None:
    manager, _ = manager_of(files)
    manager.load_lora(files / "style.safetensors")
    for call, what in (
        (lambda: manager.load_lora(files / "style.safetensors", name="style"), "is loaded already"),
        (manager.load_lora, "There is no LoRA"),
        (lambda: manager.load_lora(state_dict={}), "There is no LoRA"),
        (lambda: manager.load_lora("a.safetensors", state_dict={"a": drawn(2)}), "give one of them"),
        (
            lambda: manager.load_lora(files / "style.safetensors", name="b", mode="merge"),
            "'fuse' or 'attach'",
        ),
        (lambda: manager.load_lora(files / "style.safetensors", "1"), "lora_alpha is '1'"),
        (
            lambda: manager.load_lora(files / "style.safetensors", name="b", network="middle"),
            "network is 'middle'",
        ),
        (lambda: manager.set_lora("stile", 1.0), "loaded: 'style'"),
        (lambda: manager.unload_lora("b"), "No LoRA is named 'b'"),
    ):
        with pytest.raises(ArgumentError, match=what):
            call()  # type: ignore[no-untyped-call]


def test_each_expert_gets_its_own_lora(files: Path, tmp_path: Path) -> None:
    paths = [write_toy_dit(tmp_path / f"{r}_noise_model" / "dit.safetensors", seed=i, config=CONFIG)
             for i, r in enumerate(("high", "low"))]  # fmt: skip
    keys = load_file(files / "style.safetensors")
    high = write(tmp_path / "style_HIGH.safetensors", keys)
    manager = ModelManager(torch.float32, "cpu").load_models(paths)
    first, second = manager.model
    states = state(first), state(second)
    [report] = manager.load_lora(high)
    assert report.fitted == {"wan_video_dit (high noise)": 24}
    assert_same(second, states[1])
    assert not torch.equal(first.state_dict()["blocks.0.ffn.0.weight"], states[0]["blocks.0.ffn.0.weight"])
    manager.unload_lora()
    manager.load_lora(high, network="low")
    assert_same(first, states[0])
    manager.unload_lora()
    [report] = manager.load_lora(files / "style.safetensors")
    assert set(report.fitted) == {"wan_video_dit (high noise)", "wan_video_dit (low noise)"}
    manager.unload_lora()
    assert_same(first, states[0])
    assert_same(second, states[1])
    alone = ModelManager(torch.float32, "cpu").load_models(paths[1:])
    with pytest.raises(LoRAError, match="high-noise expert, which is not loaded"):
        alone.load_lora(high)


def test_fresh_factors_change_nothing_and_learn(files: Path, tmp_path: Path) -> None:
    from diffsynth.lora.dialects import write_loras
    from diffsynth.lora.formats import LoRA

    _, dit = manager_of(files)
    plain, dial = velocity(dit), Dial("new")
    attach(dit, fresh_changes(dit, ("q", "ffn.0"), rank=3), dial)
    assert torch.equal(velocity(dit), plain)
    factors = [p for n, p in dit.named_parameters() if n.endswith((".up", ".down"))]
    assert len(factors) == 2 * 4 * 3  # q of two attentions and ffn.0, in four blocks
    for factor in factors:
        factor.requires_grad_(True)
    text = torch.randn(1, 7, CONFIG.text_dim)
    [out] = dit(torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), [dit.prepare(Conditions(text=text))])
    out.square().sum().backward()
    ups = [p for n, p in dit.named_parameters() if n.endswith(".up")]
    assert all(up.grad is not None and up.grad.abs().max() > 0 for up in ups)
    with torch.no_grad():
        for up in ups:
            assert up.grad is not None
            up.sub_(0.01 * up.grad)
    trained = velocity(dit)
    lora = LoRA(layers=attached_layers(dit, dial), dialect="peft")
    write_loras(tmp_path / "trained.safetensors", [lora], "peft")
    again, dit2 = manager_of(files)
    again.load_lora(tmp_path / "trained.safetensors", mode="attach")
    assert torch.equal(velocity(dit2), trained)
    with pytest.raises(ArgumentError, match="ends in qq"):
        fresh_changes(dit, ("qq",), rank=3)


@pytest.mark.parametrize("mode", ["fuse", "attach"])
def test_vace_blocks_take_loras_too(mode: str, tmp_path: Path) -> None:
    golden = case("B_vace_scale1")
    config = {key: value for key, value in golden.config.items() if value is not None}
    file = write_checkpoint(tmp_path / "vace" / "model.safetensors", golden.weights("model"), config)
    shapes = golden.shapes()
    vace_layers = ("0.after_proj", "0.before_proj", "1.self_attn.q")
    layers = ["blocks.0.ffn.0", *(f"vace_blocks.{name}" for name in vace_layers)]
    keys = {}
    for layer in layers:
        down, up = pair(*shapes[f"{layer}.weight"])
        start = f"lora_unet_{flat(layer)}"
        keys |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
        keys[f"{start}.alpha"] = torch.tensor(2.0)
    lora = write(tmp_path / "lora.safetensors", keys)

    def answer(lora_mode: str | None) -> Tensor:
        manager = ModelManager(torch.float32, "cpu").load_models([file])
        dit, vace = manager.fetch_model("wan_video_dit"), manager.fetch_model("wan_video_vace")
        assert isinstance(dit, WanDiT) and isinstance(vace, DiTAdapter)
        vace.join(dit.config)
        if lora_mode is not None:
            [report] = manager.load_lora(lora, mode=lora_mode)  # type: ignore[arg-type]
            assert report.fitted == {"wan_video_dit": 1, "wan_video_vace": 3} and not report.missing
        latents, context, text = (golden.inputs[f"{n}0"][None] for n in ("x", "vace_context", "context"))
        given = Conditions(text=text, adapters={"vace": VaceCondition(context=context, scales=(1.0,))})
        with torch.no_grad():
            return dit(latents, torch.tensor([500.0]), [dit.prepare(given, [vace])])[0]

    plain, changed = answer(None), answer(mode)
    merged = {name: tensor.clone() for name, tensor in golden.weights("model").items()}
    for layer in layers:
        down, up = (keys[f"lora_unet_{flat(layer)}.lora_{part}.weight"] for part in ("down", "up"))
        merged[f"{layer}.weight"] += 2.0 / 4 * up @ down
    write_checkpoint(file, merged, config)
    expected = answer(None)
    assert (changed - expected).norm() <= 1e-5 * expected.norm() and (plain - expected).norm() > 1e-2

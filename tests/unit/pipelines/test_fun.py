"""Fun Control, Reference and Camera, and speed control, through `pipe()`: each input counts, none is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsynth.conditioning.camera import moved_poses
from diffsynth.conditioning.clips import lazy_clip
from diffsynth.errors import ArgumentError, ConfigurationError, DiffSynthError, UnusedInputError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.adapters.camera import CameraAdapter, CameraConfig
from diffsynth.models.wan.adapters.reference import ReferenceAdapter, ReferenceConfig
from diffsynth.models.wan.adapters.speed import SpeedAdapter, SpeedConfig
from diffsynth.models.wan.adapters.vace import VaceAdapter, VaceConfig
from diffsynth.pipelines.request import read_request
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.golden_recipe import recipe_input, recipe_state_dict
from tests.toys import TOY_DIT, TOY_FILES, write_toy, write_toy_dit
from tests.unit.checkpoints.weights import manifests, write_sparse
from tests.unit.pipelines.counting import calls_of

WIDTH = TOY_DIT.dim


def drawing(seed: int, *shape: int) -> Tensor:
    return recipe_input("drawing", shape, seed).sigmoid()


VIDEO, OTHER_VIDEO = drawing(0, 5, 3, 16, 32), drawing(1, 5, 3, 16, 32)
PICTURE, OTHER_PICTURE = drawing(2, 3, 16, 32), drawing(3, 3, 16, 32)


@dataclass(frozen=True)
class Variant:
    """A toy model, what it needs, and other values of each of its inputs."""

    name: str
    in_dim: int
    adapters: Callable[[], list[nn.Module]] = list
    needs: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    lack: str = ""  # words of the error without ``needs``


def reference() -> nn.Module:
    return ReferenceAdapter(ReferenceConfig(dim=WIDTH, in_dim=16))


def camera() -> nn.Module:
    return CameraAdapter(CameraConfig(dim=WIDTH))


def speed(dim: int = WIDTH) -> nn.Module:
    return SpeedAdapter(SpeedConfig(dim=dim, freq_dim=32))


def vace() -> nn.Module:
    return VaceAdapter(VaceConfig(dim=WIDTH, ffn_dim=64, num_heads=2, num_vace_blocks=1))


CONTROL = {"control_video": VIDEO}
LEFT = {"camera_control_direction": "Left", "camera_control_speed": 0.2}
VARIANTS = [
    Variant("control", 48, list, CONTROL, {"control_video": OTHER_VIDEO, "input_image": PICTURE},
            "follows a control video and none was given; give control_video="),
    Variant("control-with-reference", 48, lambda: [reference()], CONTROL,
            {"control_video": OTHER_VIDEO, "reference_image": PICTURE}, "give control_video="),
    Variant("a14b-control", 52, lambda: [reference()], CONTROL,
            {"input_image": PICTURE, "reference_image": PICTURE}, "give control_video="),
    Variant("camera", 32, lambda: [camera()], LEFT,
            {"camera_control_direction": "Up", "camera_control_speed": 0.1, "input_image": PICTURE,
             "camera_control_origin": (0, 1, 1.5, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)},
            "give camera_control_direction="),
    Variant("speed", 16, lambda: [speed()], {}, {"motion_bucket_id": 100}),
    Variant("speed-of-inp", 36, lambda: [speed()], {"input_image": PICTURE},
            {"motion_bucket_id": 100, "input_image": OTHER_PICTURE}, "input_image is missing"),
    Variant("speed-of-vace", 16, lambda: [speed(), vace()], {"vace_video": VIDEO},
            {"motion_bucket_id": 100, "vace_video": OTHER_VIDEO}),
]  # fmt: skip
CHANGES = [pytest.param(v, name, id=f"{v.name}-{name}") for v in VARIANTS for name in v.changes]
BY_NAME = {variant.name: variant for variant in VARIANTS}


def write_variant(folder: Path, variant: Variant, seed: int = 0) -> Path:
    """The DiT and its adapters in one file, as Fun models are released."""
    config = replace(TOY_DIT, in_dim=variant.in_dim)
    file = write_toy_dit(folder / "dit.safetensors", seed, config)
    shapes = {
        name: tuple(tensor.shape)
        for adapter in variant.adapters()
        for name, tensor in adapter.state_dict().items()
    }
    metadata = {"format": "pt", **_metadata(file)}
    save_file({**load_file(file), **recipe_state_dict(shapes, seed + 1)}, file, metadata)
    return file


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        return dict(opened.metadata())


Make = Callable[..., WanVideoPipeline]


@pytest.fixture
def make(toy_folder: Path, tmp_path: Path) -> Make:
    def made(*files: Path, dtype: torch.dtype = torch.float32) -> WanVideoPipeline:
        manager = ModelManager(torch_dtype=dtype, device="cpu")
        manager.load_models([*files, *(toy_folder / TOY_FILES[part] for part in ("text_encoder", "vae"))])
        return WanVideoPipeline.from_model_manager(manager)

    return made


def latents(pipe: WanVideoPipeline, **arguments: Any) -> Tensor:
    made = pipe("a red circle", **{"seed": 0, **arguments}, output_type="latent")
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize(("variant", "name"), CHANGES)
def test_each_input_changes_the_video(variant: Variant, name: str, make: Make, tmp_path: Path) -> None:
    pipe = make(write_variant(tmp_path, variant))
    before = latents(pipe, **variant.needs)
    assert torch.equal(latents(pipe, **variant.needs), before)
    after = latents(pipe, **{**variant.needs, name: variant.changes[name]})
    assert before.shape == (1, 16, 2, 2, 4) and (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.lack], ids=lambda v: v.name)
def test_without_what_it_needs_a_model_says_so(variant: Variant, make: Make, tmp_path: Path) -> None:
    pipe = make(write_variant(tmp_path, variant))
    with calls_of(pipe.text_encoder, pipe.dit) as calls, pytest.raises(ArgumentError, match=variant.lack):
        pipe("a red circle")
    assert calls == []


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_streamed_equals_resident(variant: Variant, make: Make, tmp_path: Path) -> None:
    pipe = make(write_variant(tmp_path, variant))
    arguments = {**variant.needs, **variant.changes}
    expected = latents(pipe, **arguments)
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert torch.equal(latents(pipe, **arguments), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_weights_of_every_dtype_draw_nearly_the_same(
    variant: Variant, dtype: torch.dtype, make: Make, tmp_path: Path
) -> None:
    file = write_variant(tmp_path, variant)
    arguments = {**variant.needs, **variant.changes}
    expected = latents(make(file), **arguments)
    made = latents(make(file, dtype=dtype), **arguments)
    # 8 bits of mantissa, two steps of a network of random weights; fp8 skips the first and the last block,
    # which is every block of the toy
    assert (made - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_sample_of_a_batch_equals_the_single_call(variant: Variant, make: Make, tmp_path: Path) -> None:
    pipe = make(write_variant(tmp_path, variant))
    arguments = {**variant.needs, **variant.changes}
    both = latents(pipe, **arguments, num_videos_per_prompt=2)
    for index in range(2):
        single = latents(pipe, **{**arguments, "seed": index})
        assert torch.allclose(both[index : index + 1], single, atol=5e-5)  # sums in another order


@pytest.mark.parametrize("variant", [BY_NAME["a14b-control"], BY_NAME["camera"]], ids=lambda v: v.name)
def test_each_expert_has_its_own_adapter(variant: Variant, make: Make, tmp_path: Path) -> None:
    high = write_variant(tmp_path / "high_noise_model", variant, seed=1)
    low = write_variant(tmp_path / "low_noise_model", variant, seed=5)
    pipe = make(high, low)
    assert pipe.parts.high is not None and pipe.parts.low is not None
    assert pipe.parts.high.adapters[0] is not pipe.parts.low.adapters[0]
    asked: list[nn.Module] = []
    for expert in (pipe.parts.high, pipe.parts.low):
        for layer in expert.adapters[0].modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (2, 2):
                layer.register_forward_pre_hook(lambda module, _: asked.append(module))
    arguments = {**variant.needs, **variant.changes}
    made = latents(pipe, **arguments, sigmas=[1.0, 0.5], num_inference_steps=None, sigma_shift=None)
    assert made.isfinite().all() and len(set(asked)) == 2


def test_the_control_plane_is_the_latent_of_the_video(make: Make, tmp_path: Path) -> None:
    from diffsynth.conditioning.registry import CONDITIONERS

    pipe = make(write_variant(tmp_path, BY_NAME["control"]))
    request = read_request({"prompt": "x", **CONTROL, "num_videos_per_prompt": 2}, pipe.parts, "official")
    given = CONDITIONERS["control"].encode(request.inputs["control"], request.geometry, pipe.parts)
    plane, negative = given.planes["control"]
    with torch.no_grad():
        expected = pipe.parts.vae.encode(  # type: ignore[union-attr]
            lazy_clip(VIDEO, request.geometry, name="control_video", fit=None).whole()
        )
    assert negative is None and plane.shape == (2, 16, 2, 2, 4)
    assert torch.equal(plane[0], expected[0]) and torch.equal(plane[1], expected[0])


def test_a_video_of_another_length_is_made_to_fit(make: Make, tmp_path: Path) -> None:
    pipe = make(write_variant(tmp_path, BY_NAME["control"]))
    expected = latents(pipe, control_video=VIDEO)
    longer = torch.cat([VIDEO, OTHER_VIDEO])
    assert torch.equal(latents(pipe, control_video=longer, fit="trim"), expected)
    held = torch.cat([VIDEO[:3], VIDEO[2:3], VIDEO[2:3]])
    assert torch.equal(latents(pipe, control_video=VIDEO[:3], fit="hold"), latents(pipe, control_video=held))
    with pytest.raises(
        ArgumentError, match="control_video has 10 frames and num_frames is 5; give fit='trim'"
    ):
        latents(pipe, control_video=longer)


def test_poses_are_one_more_way_to_tell_the_camera(make: Make, tmp_path: Path) -> None:
    pipe = make(write_variant(tmp_path, BY_NAME["camera"]))
    poses = moved_poses("Left", 5, speed=0.2)
    assert torch.equal(latents(pipe, camera_control_poses=poses), latents(pipe, **LEFT))


def test_speed_in_a_file_of_its_own_serves_the_dit_of_its_width(make: Make, tmp_path: Path) -> None:
    dit = write_toy_dit(tmp_path / "dit.safetensors")
    own = {"": speed(), "wide": speed(dim=64)}
    files = {
        name: write_toy_speed(tmp_path / f"speed{name}.safetensors", network) for name, network in own.items()
    }
    pipe = make(dit, files[""])
    slow, fast = (latents(pipe, motion_bucket_id=number) for number in (0, 100))
    still = latents(pipe)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((slow, fast), (slow, still), (fast, still)))
    assert pipe.last_settings.get("motion_bucket_id") is None
    with pytest.raises(ConfigurationError, match="for a DiT of width 64"):
        make(dit, files["wide"])


def write_toy_speed(file: Path, network: nn.Module) -> Path:
    return write_toy(file, network, network.config)  # type: ignore[arg-type]


def test_the_middle_of_the_speeds_lies_apart_from_both_ends(make: Make, tmp_path: Path) -> None:
    pipe = make(write_variant(tmp_path, BY_NAME["speed"]))
    made = [latents(pipe, motion_bucket_id=number) for number in (0, 50, 50.5, 100)]
    for index, one in enumerate(made):
        assert all((one - other).abs().max() > 1e-4 for other in made[index + 1 :])


WRONG: list[tuple[str, dict[str, Any], type[DiffSynthError], str]] = [
    ("speed", {"control_video": VIDEO}, UnusedInputError, "control_video was given, .* a Fun-Control model"),
    ("speed", {"reference_image": PICTURE}, UnusedInputError, "reference_image was given, .* V1.1 Control"),
    ("speed", {"camera_control_direction": "Left"}, UnusedInputError, "needs a Fun Control-Camera model"),
    ("control", {**CONTROL, "motion_bucket_id": 5}, UnusedInputError, "needs the speed-control model"),
    ("control", {**CONTROL, "reference_image": PICTURE}, UnusedInputError, "V1.1 Control"),
    ("control", {"fit": "trim"}, UnusedInputError, "fit was given, but no video"),
    ("control", {**CONTROL, "fit": "cut"}, ArgumentError, "fit is 'cut'"),
    ("control", {"control_video": VIDEO[:0]}, ArgumentError, "control_video is empty"),
    (
        "speed",
        {"motion_bucket_id": "fast"},
        ArgumentError,
        r"motion_bucket_id is 'fast'; give a number, 0 \(",
    ),
    ("speed", {"motion_bucket_id": True}, ArgumentError, "motion_bucket_id is True"),
    ("speed", {"motion_bucket_id": float("nan")}, ArgumentError, "motion_bucket_id is nan"),
]


@pytest.mark.parametrize(("name", "arguments", "kind", "words"), WRONG)
def test_wrong_calls_are_told(
    name: str, arguments: dict[str, Any], kind: type[DiffSynthError], words: str, make: Make, tmp_path: Path
) -> None:
    pipe = make(write_variant(tmp_path, BY_NAME[name]))
    with calls_of(pipe.dit) as calls, pytest.raises(kind, match=words):
        pipe("a red circle", **arguments)
    assert calls == []


def test_a_speed_outside_the_range_is_made_with_a_warning(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make(write_variant(tmp_path, BY_NAME["speed"]))
    assert latents(pipe, motion_bucket_id=127).isfinite().all()
    assert "motion_bucket_id is 127; the speed-control model was made for 0 to 100" in caplog.text


def test_networks_of_a_file_come_by_their_v1_names(tmp_path: Path) -> None:
    manager = ModelManager(torch_dtype=None, device="cpu")
    manager.load_models(
        [write_variant(tmp_path, replace(BY_NAME["speed"], adapters=lambda: [reference(), camera()]))]
    )
    assert {"wan_video_dit", "wan_video_reference_adapter", "wan_video_camera_adapter"} == set(
        manager.model_name
    )
    manager.load_models([write_toy_speed(tmp_path / "speed.safetensors", speed())])
    assert isinstance(manager.fetch_model("wan_video_motion_controller"), SpeedAdapter)
    assert asdict(manager.model[-1].config) == {"dim": WIDTH, "freq_dim": 32}  # type: ignore[call-overload]


RELEASED = [
    ("wan2.1_fun_1.3b_control", set(), {"control", "image"}),
    ("wan2.1_fun_v1.1_1.3b_control", {"reference"}, {"control", "image"}),
    ("wan2.1_fun_v1.1_14b_control", {"reference"}, {"control", "image"}),
    ("wan2.2_fun_a14b_control", {"reference"}, {"control", "mask", "image"}),
    ("wan2.2_fun_5b_control", {"reference"}, {"control", "mask", "image"}),
    ("wan2.1_fun_v1.1_1.3b_control_camera", {"camera"}, {"image"}),
    ("wan2.2_fun_a14b_control_camera", {"camera"}, {"mask", "image"}),
    ("wan2.2_fun_5b_control_camera", {"camera"}, {"mask", "image"}),
    ("wan2.1_1.3b_speedcontrol_v1", {"speed"}, set()),
]


@pytest.mark.parametrize(("model", "adapters", "planes"), RELEASED, ids=[model for model, *_ in RELEASED])
def test_released_files_become_a_dit_and_its_adapters(
    model: str, adapters: set[str], planes: set[str], tmp_path: Path
) -> None:
    files = [write_sparse(tmp_path / "model.safetensors", manifests()[model])]
    if model == "wan2.1_1.3b_speedcontrol_v1":
        files.append(write_sparse(tmp_path / "dit.safetensors", manifests()["wan2.1_t2v_1.3b"]))
    manager = ModelManager(torch_dtype=None, device="cpu").load_models(files)
    parts = WanVideoPipeline.from_model_manager(manager).parts
    assert (set(parts.facts.adapters), set(parts.facts.planes)) == (adapters, planes)

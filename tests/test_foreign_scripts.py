"""The 34 Wan scripts of DiffSynth-Studio 1.1.9, in our words, on toys that lie where their ids put them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth import ModelConfig as TopModelConfig
from diffsynth import VideoData, save_video
from diffsynth.errors import ArgumentError, CheckpointNotFoundError, UnsupportedModelError, UnusedInputError
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video_new import ModelConfig, WanVideoPipeline
from tests.unit.checkpoints.weights import manifests, write_sparse

DIT = "diffusion_pytorch_model*.safetensors"
T5, VAE, VAE22 = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
T2V, I2V = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-I2V-14B-480P"
EXPERTS = ("high_noise_model", "low_noise_model")
SPEED = "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
FRAMES = [PICTURE] * 5
Calls = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Script:
    """What one of them loads and calls."""

    name: str
    model_id: str
    kind: str  # of the toy that stands there
    files: tuple[str, ...] = (DIT, T5, VAE)
    calls: Calls = ({},)
    extra: tuple[tuple[str, str], ...] = ()  # further ids and patterns
    loading: Mapping[str, Any] = field(default_factory=dict)  # of from_pretrained
    refused: tuple[type[Exception], str] | None = None  # and its words


def both(*names: str) -> tuple[str, ...]:
    return (*(f"{role}/{DIT}" for role in EXPERTS), *names)


def vace_calls() -> Calls:
    return (
        {"vace_video": FRAMES},
        {"vace_reference_image": PICTURE},
        {"vace_video": FRAMES, "vace_reference_image": PICTURE},
    )


WITH_CLIP = (DIT, T5, VAE, CLIP)
START = ({"input_image": PICTURE},)
TURNS = tuple({"input_image": PICTURE, "camera_control_direction": way, "camera_control_speed": 0.01}
              for way in ("Left", "Up"))  # fmt: skip
LATER = "recognised, but not built by this version"


def fun(name: str, kind: str, calls: Calls) -> Script:
    return Script(name=name, model_id=f"PAI/{name}", kind=kind, files=WITH_CLIP, calls=calls)


def fun_a14b(name: str, kind: str, calls: Calls) -> Script:
    return Script(name=name, model_id=f"PAI/{name}", kind=kind, files=both(T5, VAE), calls=calls)


SCRIPTS = (
    Script(name="teacache", model_id=T2V, kind="t2v",
           calls=({"tea_cache_l1_thresh": 0.05, "tea_cache_model_id": "Wan2.1-T2V-1.3B"},),
           refused=(UnusedInputError, "tea_cache_l1_thresh .* step cache")),
    Script(name="unified_sequence_parallel", model_id="Wan-AI/Wan2.1-T2V-14B", kind="t2v",
           loading={"use_usp": True}, refused=(ArgumentError, "use_usp=True: several GPUs")),
    Script(name="LongCat-Video", model_id="meituan-longcat/LongCat-Video", kind="longcat",
           files=(f"dit/{DIT}",), extra=((T2V, T5), (T2V, VAE)),
           refused=(UnsupportedModelError, "LongCat-Video")),
    Script(name="Video-As-Prompt-Wan2.1-14B", model_id="ByteDance/Video-As-Prompt-Wan2.1-14B",
           kind="video-as-prompt", files=(f"transformer/{DIT}",), extra=((T2V, T5), (T2V, VAE)),
           refused=(UnsupportedModelError, f"Video-As-Prompt.*{LATER}")),
    Script(name="Wan2.1-1.3b-speedcontrol-v1", model_id=T2V, kind="t2v",
           extra=((SPEED, "model.safetensors"),),
           calls=({"motion_bucket_id": 0}, {"motion_bucket_id": 100})),
    Script(name="Wan2.1-FLF2V-14B-720P", model_id="Wan-AI/Wan2.1-FLF2V-14B-720P", kind="flf2v",
           files=WITH_CLIP, calls=({"input_image": PICTURE, "end_image": PICTURE, "sigma_shift": 16},)),
    fun("Wan2.1-Fun-1.3B-Control", "control", ({"control_video": FRAMES},)),
    fun("Wan2.1-Fun-1.3B-InP", "i2v", START),
    fun("Wan2.1-Fun-14B-Control", "control", ({"control_video": FRAMES},)),
    fun("Wan2.1-Fun-14B-InP", "i2v", START),
    fun("Wan2.1-Fun-V1.1-1.3B-Control-Camera", "camera", TURNS),
    fun("Wan2.1-Fun-V1.1-1.3B-Control", "reference",
        ({"control_video": FRAMES, "reference_image": PICTURE},)),
    fun("Wan2.1-Fun-V1.1-1.3B-InP", "i2v", START),
    fun("Wan2.1-Fun-V1.1-14B-Control-Camera", "camera", TURNS),
    fun("Wan2.1-Fun-V1.1-14B-Control", "reference",
        ({"control_video": FRAMES, "reference_image": PICTURE},)),
    fun("Wan2.1-Fun-V1.1-14B-InP", "i2v", START),
    Script(name="Wan2.1-I2V-14B-480P", model_id=I2V, kind="i2v", files=WITH_CLIP, calls=START),
    Script(name="Wan2.1-I2V-14B-720P", model_id="Wan-AI/Wan2.1-I2V-14B-720P", kind="i2v", files=WITH_CLIP,
           calls=START),
    Script(name="Wan2.1-T2V-1.3B", model_id=T2V, kind="t2v",
           calls=({}, {"input_video": FRAMES, "denoising_strength": 0.7})),
    Script(name="Wan2.1-T2V-14B", model_id="Wan-AI/Wan2.1-T2V-14B", kind="t2v"),
    Script(name="Wan2.1-VACE-1.3B-Preview", model_id="iic/VACE-Wan2.1-1.3B-Preview", kind="vace",
           calls=vace_calls()),
    Script(name="Wan2.1-VACE-1.3B", model_id="Wan-AI/Wan2.1-VACE-1.3B", kind="vace", calls=vace_calls()),
    Script(name="Wan2.1-VACE-14B", model_id="Wan-AI/Wan2.1-VACE-14B", kind="vace", calls=vace_calls()),
    Script(name="Wan2.2-Animate-14B", model_id="Wan-AI/Wan2.2-Animate-14B", kind="animate", files=WITH_CLIP,
           refused=(UnsupportedModelError, f"pose and face adapter of Animate.*{LATER}")),
    fun_a14b("Wan2.2-Fun-A14B-Control-Camera", "camera-a14b", TURNS),
    fun_a14b("Wan2.2-Fun-A14B-Control", "control-a14b",
             ({"control_video": FRAMES, "reference_image": PICTURE},)),
    fun_a14b("Wan2.2-Fun-A14B-InP", "i2v-a14b", START),
    Script(name="Wan2.2-I2V-A14B", model_id="Wan-AI/Wan2.2-I2V-A14B", kind="i2v-a14b",
           files=both(T5, VAE), calls=({"input_image": PICTURE, "switch_DiT_boundary": 0.9},)),
    *(Script(name=f"Wan2.2-S2V-14B{more}", model_id="Wan-AI/Wan2.2-S2V-14B", kind="speech",
             loading={"audio_processor_config": ModelConfig(model_id="Wan-AI/Wan2.2-S2V-14B")},
             refused=(UnsupportedModelError, f"speech adapter of S2V.*{LATER}"))
      for more in ("", "_multi_clips")),
    Script(name="Wan2.2-T2V-A14B", model_id="Wan-AI/Wan2.2-T2V-A14B", kind="t2v", files=both(T5, VAE)),
    Script(name="Wan2.2-TI2V-5B", model_id="Wan-AI/Wan2.2-TI2V-5B", kind="ti2v", files=(T5, DIT, VAE22),
           calls=({"num_frames": 9}, {"input_image": PICTURE.resize((64, 32))})),
    fun_a14b("Wan2.2-VACE-Fun-A14B", "vace", vace_calls()),
    Script(name="krea-realtime-video", model_id="krea/krea-realtime-video", kind="krea",
           files=("krea-realtime-video-14b.safetensors",), extra=((T2V, T5), (T2V, VAE)),
           calls=({"num_inference_steps": 6, "cfg_scale": 1, "sigma_shift": 20},)),
)  # fmt: skip

# Real headers over holes: networks that this version does not build are told by names and shapes.
HEADERS = {
    "animate": "wan2.2_animate_14b", "longcat": "longcat_video", "speech": "wan2.2_s2v_14b",
    "video-as-prompt": "video_as_prompt_wan2.1_14b",
}  # fmt: skip


class Shelf:
    """Toys under the folders of ids, made when they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._toys: dict[tuple[str, int], list[str]] = {}
        files = self.toy("t2v")
        self._pth(files[1], T2V, T5)
        self._pth(files[2], T2V, VAE)
        words = self.root / T2V / "google" / "umt5-xxl" / "spiece.model"
        words.parent.mkdir(parents=True)
        words.write_bytes((Path(files[0]).parent / "google" / "umt5-xxl" / "spiece.model").read_bytes())
        self._pth(self.toy("i2v")[3], I2V, CLIP)
        self._pth(self.toy("ti2v")[2], "Wan-AI/Wan2.2-TI2V-5B", VAE22)
        speed = load_file(self.toy("speed")[0])
        adapter = {name: tensor for name, tensor in speed.items() if name.startswith("linear.")}
        self._write(adapter, self.toy("speed")[0], SPEED, "model.safetensors")

    def toy(self, kind: str, count: int = 1) -> list[str]:
        if (kind, count) not in self._toys:
            self._toys[kind, count] = toy_files(kind, num_experts=count)
        return self._toys[kind, count]

    def put(self, script: Script) -> None:
        """The DiTs of a script; text encoder, VAE and CLIP are those that many repositories have alike."""
        patterns = [name for name in script.files if name.endswith(".safetensors")]
        for index, pattern in enumerate(patterns):
            folder, _, name = pattern.rpartition("/")
            if list((self.root / script.model_id).glob(pattern)):
                continue
            if script.kind in HEADERS:
                path = self.root / script.model_id / pattern.replace("*", "")
                path.parent.mkdir(parents=True)
                write_sparse(path, manifests()[HEADERS[script.kind]])
                continue
            source, tensors = self._dit(script, index, len(patterns))
            if "*" not in name:
                self._write(tensors, source, script.model_id, pattern)
                continue
            names, count = list(tensors), 3 if "14B" in script.model_id else 1
            for number in range(count):
                shard = {key: tensors[key] for key in names[number::count]}
                file = name.replace("*", f"-{number + 1:05d}-of-{count:05d}" if count > 1 else "")
                self._write(shard, source, script.model_id, f"{folder}/{file}" if folder else file)

    def _dit(self, script: Script, index: int, count: int) -> tuple[str, dict[str, torch.Tensor]]:
        source = self.toy("t2v" if script.kind == "krea" else script.kind, count)[index]
        start = "model." if script.kind == "krea" else ""
        return source, {f"{start}{name}": tensor for name, tensor in load_file(source).items()}

    def _write(self, tensors: dict[str, torch.Tensor], source: str, model_id: str, name: str) -> None:
        path = self.root / model_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with safe_open(source, "pt") as file:
            save_file(tensors, path, file.metadata())

    def _pth(self, source: str, model_id: str, name: str) -> None:
        path = self.root / model_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
        torch.save({**load_file(source), "metadata": metadata}, path)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("models"))


def configs_of(script: Script, root: Path, **more: Any) -> list[ModelConfig]:
    named = [*((script.model_id, name) for name in script.files), *script.extra]
    return [
        ModelConfig(model_id=model_id, origin_file_pattern=pattern, local_model_path=str(root),
                    **{"offload_device": "cpu", "skip_download": True, **more})
        for model_id, pattern in named
    ]  # fmt: skip


def run(script: Script, root: Path, folder: Path) -> None:
    pipe = WanVideoPipeline.from_pretrained(
        torch_dtype=torch.bfloat16, device="cpu", model_configs=configs_of(script, root), **script.loading
    )
    pipe.enable_vram_management()
    for index, arguments in enumerate(script.calls):
        video = pipe(prompt="a red circle", negative_prompt="blue", seed=index, tiled=True, **arguments)
        save_video(video, str(folder / f"{index}.mp4"), fps=15, quality=5)
        assert len(VideoData(str(folder / f"{index}.mp4"))) == len(video)


def rows() -> list[Any]:
    """Scripts whose toy is another's run with the slow tests."""
    seen: set[tuple[str, int, int]] = set()
    found = []
    for script in SCRIPTS:
        own = (script.kind, len(script.files), len(script.extra))
        marks = [pytest.mark.slow] if own in seen and script.refused is None else []
        seen.add(own)
        found.append(pytest.param(script, id=script.name, marks=marks))
    return found


@pytest.mark.parametrize("script", rows())
def test_script_runs_or_names_what_is_missing(script: Script, shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(script)
    if script.refused is None:
        run(script, shelf.root, tmp_path)
        return
    kind, words = script.refused
    with pytest.raises(kind, match=words):
        run(script, shelf.root, tmp_path)


def test_the_page_tells_of_each_whether_it_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "diffsynth_studio.md").read_text("utf-8")
    table = page.partition("## The 34 Wan scripts")[2]
    lines = [line.strip("| ").partition(" | ") for line in table.splitlines() if line.startswith("| ")]
    told = {name: what for names, _, what in lines[1:] for name in names.split(", ")}
    assert len({script.name for script in SCRIPTS}) == len(SCRIPTS) == 34
    assert {script.name: script.refused is None for script in SCRIPTS} == {
        name: what == "runs" for name, what in told.items()
    }
    assert f"{sum(script.refused is None for script in SCRIPTS)} go through" in page


def pipeline(shelf: Shelf, configs: list[ModelConfig], **more: Any) -> WanVideoPipeline:
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", model_configs=configs, **more
    )


def latents(pipe: WanVideoPipeline) -> torch.Tensor:
    made = pipe("a red circle", seed=0, output_type="latent")
    assert isinstance(made, torch.Tensor)
    return made


BASE = next(script for script in SCRIPTS if script.name == "Wan2.1-T2V-1.3B")
VRAM_CONFIG = {
    "offload_dtype": "disk", "offload_device": "disk", "onload_dtype": torch.float32, "onload_device": "cpu",
    "preparing_dtype": torch.float32, "preparing_device": "cpu", "computation_dtype": torch.float32,
    "computation_device": "cpu",
}  # fmt: skip


def test_placements_of_2x_are_an_arrangement_of_ours_and_change_no_video(
    shelf: Shelf, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shelf.put(BASE)
    caplog.set_level("INFO", "diffsynth")
    expected = latents(pipeline(shelf, configs_of(BASE, shelf.root, offload_device=None)))
    assert not [line for line in caplog.messages if line.startswith("Weights rest")]
    tokens = TopModelConfig(model_id=T2V, origin_file_pattern="google/umt5-xxl/", local_model_path=shelf.root)
    managed = pipeline(
        shelf, configs_of(BASE, shelf.root, **VRAM_CONFIG), vram_limit=2.0, tokenizer_config=tokens
    )
    told = [line for line in caplog.messages if line.startswith("Weights rest")]
    assert told == [
        "Weights rest on the host, mapped from their files, in float32; they compute on cpu, and blocks that "
        "do not fit into vram_limit=2 GiB are streamed."
    ]
    assert managed.memory_plan is not None and torch.equal(latents(managed), expected)
    least = pipeline(shelf, configs_of(BASE, shelf.root, **VRAM_CONFIG), vram_limit=0)
    assert least.memory_plan is not None and least.memory_plan.networks["dit"].where == "streamed"
    assert torch.equal(latents(least), expected)
    half = pipeline(
        shelf,
        configs_of(BASE, shelf.root, offload_dtype=torch.float8_e4m3fn, computation_dtype=torch.bfloat16),
    )
    assert "fp8" in half.describe() and torch.isfinite(latents(half)).all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"computation_dtype": torch.float16},
            "computation_dtype is float16 and weights are kept in float32",
        ),
        ({"computation_device": "cuda:1"}, "compute on one device"),
        ({"offload_device": "moon"}, "A device is 'moon'"),
        ({"offload_dtype": "fp8"}, "offload_dtype='fp8'"),
        ({"computation_dtype": "disk"}, "computation_dtype='disk'"),
        ({"quantize": object()}, r"ModelConfig\(quantize=...\) is not in this version"),
        ({"clear_parameters": True}, "clear_parameters"),
        ({"model_id": None}, "ModelConfig names no model"),
        ({"model_id": "../../etc"}, "names '../../etc'; an id and its files"),
        ({"origin_file_pattern": "/etc/*"}, "names '/etc/.*give path="),
        (
            {"download_source": "moon", "skip_download": False, "local_model_path": "no"},
            "is 'moon'; give 'mod",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_placements_that_cannot_be_are_told(shelf: Shelf, more: dict[str, Any], words: str) -> None:
    shelf.put(BASE)
    configs = configs_of(BASE, shelf.root)
    for name, value in more.items():
        setattr(configs[0], name, value)
    with pytest.raises(ArgumentError, match=words):
        pipeline(shelf, configs)


def test_what_is_missing_is_told_at_once_with_the_lines_that_fetch_it(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = next(script for script in SCRIPTS if script.name == "Wan2.2-T2V-A14B")
    absent = configs_of(script, tmp_path, skip_download=None)
    with pytest.raises(CheckpointNotFoundError) as caught:
        pipeline(shelf, absent)
    text = str(caught.value)
    fetching = f"modelscope download --model {script.model_id}"
    assert text.count(fetching) == 4 and f"--include 'low_noise_model/{DIT}'" in text
    assert f"--local_dir '{tmp_path / script.model_id}'" in text and "DIFFSYNTH_SKIP_DOWNLOAD=False" in text
    for never in (True, None):
        monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "false" if never else "true")
        with pytest.raises(CheckpointNotFoundError, match="forbids" if never else "Or allow the download"):
            pipeline(shelf, configs_of(script, tmp_path, skip_download=never), download=bool(never))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "perhaps")
    with pytest.raises(ArgumentError, match="is 'perhaps'; give True"):
        pipeline(shelf, configs_of(script, tmp_path, skip_download=None))
    assert list(tmp_path.iterdir()) == [], "nothing was downloaded, and no folder made"


@pytest.mark.parametrize("way", ["skip_download=False", "environment", "download=True"])
def test_a_download_that_was_allowed_is_asked_for_by_id_and_pattern(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def snapshot(site: str, model_id: str, patterns: list[str] | None, folder: Path) -> str:
        asked.append((site, model_id, patterns, folder))
        raise OSError("no network in tests")

    monkeypatch.setattr("diffsynth.models.download._snapshot", snapshot)
    if way == "environment":
        monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "False")
    config = ModelConfig(model_id=T2V, origin_file_pattern=VAE, local_model_path=tmp_path,
                         download_source="huggingface",
                         skip_download=False if way == "skip_download=False" else None)  # fmt: skip
    with pytest.raises(CheckpointNotFoundError, match="no network in tests"):
        if way == "download=True":
            WanVideoPipeline.from_pretrained(device="cpu", model_configs=[config], download=True)
        else:
            config.download_if_necessary()
    assert asked == [("HuggingFace", T2V, [VAE], tmp_path / T2V)]


def test_a_config_finds_its_files(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.put(BASE)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(shelf.root))
    config = ModelConfig(model_id=T2V, origin_file_pattern=DIT)
    config.download_if_necessary()
    assert config.path == str(shelf.root / T2V / "diffusion_pytorch_model.safetensors")
    config.reset_local_model_path()
    assert config.local_model_path == str(shelf.root)
    whole = ModelConfig(model_id=T2V)
    assert whole.found() == str(shelf.root / T2V)
    plain = pipeline(shelf, [ModelConfig(path=[config.path]), ModelConfig(path=shelf.root / T2V / T5),
                             ModelConfig(path=shelf.root / T2V / VAE)])  # fmt: skip
    assert torch.equal(latents(plain), latents(pipeline(shelf, [whole])))
    with pytest.raises(CheckpointNotFoundError, match="is not here"):
        pipeline(shelf, [ModelConfig(model_id="PAI/Wan2.1-Fun-1.3B-InP", origin_file_pattern=T5)],
                 redirect_common_files=False)  # fmt: skip
    for wrong, words in (
        (WanVideoPipeline.from_pretrained, "one of them"),
        (lambda: WanVideoPipeline.from_pretrained("x", model_configs=[whole]), "one of them"),
        (
            lambda: WanVideoPipeline.from_pretrained(shelf.root / T2V, tokenizer_config=whole),
            "tokenizer_path",
        ),
        (lambda: pipeline(shelf, []), "model_configs is empty"),
        (lambda: WanVideoPipeline.from_pretrained(torch.bfloat16), "path is torch.bfloat16"),  # type: ignore[arg-type]
        (lambda: pipeline(shelf, [whole], tokenizer_config="x"), "tokenizer_config is 'x'"),
        (lambda: pipeline(shelf, ["x"]), "model_configs holds 'x'"),  # type: ignore[list-item]
    ):
        check: Callable[[], object] = wrong
        with pytest.raises(ArgumentError, match=words):
            check()
    with pytest.raises(UnusedInputError, match=r"audio_processor_config .* Wan2.2-S2V-14B"):
        pipeline(shelf, [whole], audio_processor_config=whole)


def test_a_buffer_is_left_of_a_limit(shelf: Shelf) -> None:
    shelf.put(BASE)
    pipe = pipeline(shelf, configs_of(BASE, shelf.root))
    pipe.enable_vram_management(vram_limit=2.0, vram_buffer=0.5)
    assert pipe._memory._limits is not None
    assert pipe._memory._limits.vram_gib(torch.device("cpu")) == 1.5
    for wrong, words in (
        ({"vram_buffer": 0.5}, "vram_limit that was not given"),
        ({"vram_limit": 2.0, "vram_buffer": 2.0}, "less than vram_limit"),
        ({"vram_limit": 2.0, "vram_buffer": -1.0}, "from 0"),
    ):
        with pytest.raises(ArgumentError, match=words):
            pipe.enable_vram_management(**wrong)  # type: ignore[arg-type]


def test_names_that_are_not_there_say_why() -> None:
    from importlib import import_module

    for module, name, words in (
        ("diffsynth", "save_video_with_audio", "sound.*Wan2.2-S2V-14B"),
        ("diffsynth.utils.data", "save_video_with_audio", "sound.*Wan2.2-S2V-14B"),
        ("diffsynth.pipelines.wan_video_new", "WanVideoUnit_S2V", "Wan2.2-S2V-14B"),
        ("diffsynth.pipelines.wan_video_new", "WanVideoUnit_VACE", "add_a_variant.md"),
        ("diffsynth.pipelines.wan_video_new", "model_fn_wan_video", "pipe.dit"),
    ):
        with pytest.raises(ImportError, match=words):
            getattr(import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'Wan'"):
        _ = import_module("diffsynth.pipelines.wan_video_new").Wan
